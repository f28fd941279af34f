"""The training loop: data, step, epochs, callbacks, progress, and the `Model` that users call."""
