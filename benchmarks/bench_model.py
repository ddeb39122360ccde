def model_tables(r):
    return ""
