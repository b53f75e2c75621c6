"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only package that knows model zoos.
"""

from hookx.models import model_files, torchvision_zoo
from hookx.models.loaded import LoadedModel, ModelOptions
from hookx.models.torchvision_zoo import forward_of, list_models

__all__ = ["LoadedModel", "ModelOptions", "forward_of", "list_models", "load_model", "skeleton"]


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model with the weights asked for.

    Args:
        ref: a name that `list_models` gives, or a file: a checkpoint that names its architecture
            (`{"arch": "resnet18", "state_dict": ...}`), a pickled module, or an exported program (.pt2).
        weights: 'default' (the architecture's DEFAULT weights; those in the file), a weights name such as
            'IMAGENET1K_V2', 'none' (random: `torch.manual_seed(seed)`, then the model is built on the CPU), or a file
            of weights, which is read without running any code in it.
        options: the seed of random weights, and what else can be said.

    Raises:
        ModelError: no such model or weights; weights that cannot be downloaded, read, or made to fit.

    Example:
        >>> model = load_model("resnet18", weights="none")
        >>> model.module.training, model.weights, str(model.preprocessing)[:33]
        (False, 'random (seed 0)', 'resize 256 (bilinear), crop 224, ')
    """
    if model_files.is_model_file(ref):
        return model_files.load_model_file(ref, weights, options)
    return torchvision_zoo.load_model(ref, weights, options)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model without memory for its parameters (meta device): its layers, and what it expects of an image.

    A model that exists only as a whole (a pickled module, an exported program) is the model itself.

    Example:
        >>> model = skeleton("vit_h_14")
        >>> next(model.module.parameters()).device.type, model.preprocessing.crop_px
        ('meta', 518)
    """
    if model_files.is_model_file(ref):
        return model_files.skeleton_of_file(ref, weights, options)
    return torchvision_zoo.skeleton(ref, weights, options)
