"""Models of Keras 3 on the torch backend."""
