"""The code of Markdown pages, and a small model and tokenizer in place of those that it loads."""

import re

CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def code_of(text):
    """The Python blocks of a page."""
    return CODE.findall(text)


def small_models(monkeypatch):
    """Has `from_pretrained` of transformers return a small Gemma 2 (of AutoModel: a BERT) and a tokenizer of
    characters; returns the Gemma 2."""
    import torch
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()

    class Tokenizer:
        def __call__(self, text, return_tensors=None, add_special_tokens=True, padding=False):
            if isinstance(text, list):
                rows = [torch.tensor([2 + ord(c) % 120 for c in one[:3000]]) for one in text]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})
            ids = [2 + ord(c) % 120 for c in text[:3000]]
            if return_tensors == "pt":
                return transformers.BatchEncoding({"input_ids": torch.tensor([ids])})
            return transformers.BatchEncoding({"input_ids": ids})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    encoder = transformers.BertConfig(  # the oldest releases cannot switch a ModernBERT
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=3000, pad_token_id=0,
    )  # fmt: skip
    encoder = transformers.BertModel(encoder).eval()
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name, **options: encoder)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: Tokenizer())
    return model
