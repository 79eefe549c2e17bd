"""e18: calls the loss and then backward, because a wrong gradient may hide behind a right loss."""


def loss_and_gradient(student, logits, labels):
    """The loss and its gradient with respect to the logits."""
    leaf = logits.clone().requires_grad_()
    loss = student.next_token_loss(leaf, labels)
    loss.backward()
    return loss.detach(), leaf.grad
