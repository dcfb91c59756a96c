"""One metric a module. They take pictures, features or scores as tensors and know nothing of models or arms."""
