"""Checks of a model on this machine (`backlens doctor`): its matrices, and its numbers against autograd and logits."""
