"""Context parallel: attention to keys that several ranks of torch.distributed hold.

- layout.py: which rank computes and holds which tokens; plain arithmetic without torch.
- link.py: messages between ranks, their bytes, and what is said when a rank fails.
- attention.py: attention across ranks.

torch.distributed is used in link.py only. hf/parallel.py hands a model its part of the tokens.
"""
