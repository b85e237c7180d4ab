"""The core of regard: tensors only. It knows no model, no paper, no file and no console."""
