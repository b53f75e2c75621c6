"""Every option once: its name, type, default, vocabulary, bounds and sentence of help. No torch.

An option is a field of a class below, which is a frozen dataclass. From the field follow

- the argument of the Python function: `takes` gives a function the signature of its class of options;
- the flag, `--batch-size`, what a shell completes for it, its key in a TOML file, and the reference page;
- the environment variable, `HOOKX_BATCH_SIZE`, in the classes marked with `variables=True`: those of `hookx extract`
  except what shapes one call (`CallOptions`). Other commands read the variables of the groups that they share with it.

Making a value of such a class checks its fields, so a flag, a variable, a file and a Python caller get the same error.
"""

from hookx.options.commands import (
    CallOptions,
    CatOptions,
    ExportOptions,
    ExtractOptions,
    FinishOptions,
    GivenOptions,
    InspectOptions,
    LayerOfRunOptions,
    ListLayersOptions,
    ListModelsOptions,
    PlanOptions,
    RecomputeOptions,
    RunOptions,
    StoredRunOptions,
    VisualizeOptions,
    VisualizeRunOptions,
)
from hookx.options.groups import (
    BuildOptions,
    CheckpointOptions,
    ComputeOptions,
    JsonOptions,
    LauncherOptions,
    LookOptions,
    ModelOptions,
    PreprocessingOptions,
    Progress,
    ReportOptions,
)
from hookx.options.option import takes
from hookx.options.values import (
    DTYPE_NAMES,
    MAX_SHARD_BYTES,
    MAX_SHARD_IMAGES,
    RETRY_SECONDS,
    AnyPath,
    ChannelReduction,
    Decode,
    Device,
    Dtype,
    Exif,
    Interpolation,
    Launcher,
    Layout,
    MemoryFormat,
    OnIOError,
    Paths,
    Precision,
    list_paths,
    parse_bytes,
)

__all__ = [
    "DTYPE_NAMES",
    "MAX_SHARD_BYTES",
    "MAX_SHARD_IMAGES",
    "RETRY_SECONDS",
    "AnyPath",
    "BuildOptions",
    "CallOptions",
    "CatOptions",
    "ChannelReduction",
    "CheckpointOptions",
    "ComputeOptions",
    "Decode",
    "Device",
    "Dtype",
    "Exif",
    "ExportOptions",
    "ExtractOptions",
    "FinishOptions",
    "GivenOptions",
    "InspectOptions",
    "Interpolation",
    "JsonOptions",
    "Launcher",
    "LauncherOptions",
    "LayerOfRunOptions",
    "Layout",
    "ListLayersOptions",
    "ListModelsOptions",
    "LookOptions",
    "MemoryFormat",
    "ModelOptions",
    "OnIOError",
    "Paths",
    "PlanOptions",
    "Precision",
    "PreprocessingOptions",
    "Progress",
    "RecomputeOptions",
    "ReportOptions",
    "RunOptions",
    "StoredRunOptions",
    "VisualizeOptions",
    "VisualizeRunOptions",
    "list_paths",
    "parse_bytes",
    "takes",
]
