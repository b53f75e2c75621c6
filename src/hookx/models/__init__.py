"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only package that knows model zoos.
"""

from hookx.models.loaded import LoadedModel, ModelOptions
from hookx.models.torchvision_zoo import forward_of, list_models, load_model, skeleton

__all__ = ["LoadedModel", "ModelOptions", "forward_of", "list_models", "load_model", "skeleton"]
