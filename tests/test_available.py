"""`available_backends()` looks at everything and imports none of the heavy stacks."""
import re

from helpers import fresh

HEAVY = ["openvino", "executorch", "coremltools", "tensorrt", "torch_tensorrt", "onnxruntime", "onnx", "onnxscript",
         "onnx_ir", "torch_xla", "torch_neuronx", "torch_tpu", "libtpu", "cerebras", "triton", "torch._inductor.compile_fx",
         "torch._inductor.config", "torchao", "tensorflow", "jax"]


def test_probing_imports_no_heavy_stack():
    "The time is printed, not asserted: a busy machine proves nothing"
    res = fresh(f"""
import time, torch
import fastai.vision.all # torchvision brings torch._dynamo, and that triton
brought = set(sys.modules)
import fastai_compile
before = set(sys.modules)
start = time.perf_counter()
table = fastai_compile.available_backends()
seconds = time.perf_counter() - start
new = set(sys.modules) - before
heavy = {HEAVY!r}
answer(dict(rows=table, seconds=seconds, cuda=torch.cuda.is_initialized(), new=sorted(new),
            heavy=[m for m in heavy if m in new or any(n.startswith(m + '.') for n in new)],
            loaded=[m for m in heavy if m in set(sys.modules) - brought]))
""")
    print(f"{len(res['rows'])} targets probed in {res['seconds']*1000:.0f} ms")
    assert res["heavy"] == [] and res["loaded"] == [] and not res["cuda"]
    assert len(res["new"]) < 100, res["new"]


def test_every_row_says_why_and_what_to_do():
    from fastai_compile import available_backends
    rows = available_backends()
    assert len({r["backend"] for r in rows}) == len(rows)
    for r in rows:
        assert r["reason"], r
        if r["usable"] == "no": assert r["to mend it"], r
        assert not re.search(r"\n|  ", r["reason"]), r
