"""e17: one layer of attention over the student's row. The rest of a transformer works on each token for itself."""

import torch.nn.functional as F


def through_attention(student, documents, capacity, pad_id, tokens, places, weights, out):
    """Logits of the documents' tokens, the sum of the losses, and the gradient of the table of tokens."""
    ids, labels, positions, mask = student.assemble(documents, capacity, pad_id)
    table = tokens.clone().requires_grad_()
    x = table[ids] + places[positions]
    q, k, v = (x @ weight.T for weight in weights)
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    logits = scores.softmax(-1) @ v @ out.T @ table.T
    loss = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    loss.backward()
    return logits[: sum(map(len, documents))].detach(), loss.detach(), table.grad
