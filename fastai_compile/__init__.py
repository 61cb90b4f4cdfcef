"Export any fastai Learner as one verified, compiled file"
__version__ = "0.1.0"

from fastai_compile.artifact import inspect_artifact
from fastai_compile import text as _text  # noqa: F401 - registers its rewrite
from fastai_compile.backends import (  # noqa: F401 - register themselves
    cerebras as _cerebras, cerebras_dynamo as _cerebras_dynamo, coreml as _coreml, cuda as _cuda, executorch as _executorch,
    inductor as _inductor, neuron as _neuron, onnx_file as _onnx_file, onnxruntime as _onnxruntime, openvino as _openvino,
    providers as _providers, tensorrt as _tensorrt, xla as _xla)
from fastai_compile import explain as _explain, fast as _fast  # noqa: F401 - give `Learner` `explain` and `fast_images`
from fastai_compile.backends.base import available_backends, register_backend
from fastai_compile.bench import benchmark
from fastai_compile.breaks import find_breaks
from fastai_compile.config import CompileConfig
from fastai_compile.errors import (ArtifactError, BackendError, BackendUnavailable, CaptureError, CompileError,
                                   ConfigError, ExampleError, FallbackError, GraphBreakError, HostMismatch, InputError,
                                   MissingDefinition, NotTrainable, RandomTransformError, VerificationError, WriteError)
from fastai_compile.example import example_batch
from fastai_compile.freeze import FreezeTransforms, frozen
from fastai_compile.graph_callback import GraphBreakCallback
from fastai_compile.items import InvalidInput, stock_input
from fastai_compile.learner import open_learner
from fastai_compile.model import CompiledModel
from fastai_compile.randomness import find_random
from fastai_compile.report import Report

__all__ = ["ArtifactError", "BackendError", "BackendUnavailable", "CaptureError", "CompileConfig", "CompileError",
           "CompiledModel", "ConfigError", "ExampleError", "FallbackError", "FreezeTransforms",
           "GraphBreakCallback", "GraphBreakError", "HostMismatch", "InputError", "InvalidInput",
           "MissingDefinition", "NotTrainable", "RandomTransformError", "Report", "VerificationError", "WriteError",
           "available_backends", "benchmark", "example_batch", "find_breaks", "find_random", "frozen",
           "inspect_artifact", "open_learner", "register_backend", "stock_input"]
