"""What `compile='onnxruntime'` costs over the same by hand: capture, conversion and session, each in fresh processes.

By hand means `torch.export.export`, `torch.onnx.export(dynamo=True)` and `InferenceSession`. Both sides pay for the
imports that they need. The gate, which has no counterpart by hand, stands on its own line.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from benchmarks.common import RESULTS, child_env, facts, parse, table, timed, write
from benchmarks.families_data import build

MODELS = {"resnet18": "resnet18", "tabular": "tabular_classification"}
TARGET = 1.5
OURS = ("capture", "compile", "load") # stages of the report that have a counterpart by hand
GATE = ("reference", "gate")          # stages that compare


def by_hand(learn, path: Path) -> dict:
    "Seconds of capture, conversion and session, as one would write them down"
    *xb, _ = learn.dls.valid.one_batch()
    xs, model = tuple(x.as_subclass(torch.Tensor).contiguous() for x in xb), learn.model.eval()
    batch, start = torch.export.Dim("batch", min=1, max=64), time.perf_counter()
    with torch.no_grad(): program = torch.export.export(model, xs, dynamic_shapes=tuple({0: batch} for _ in xs), strict=False)
    captured = time.perf_counter()
    torch.onnx.export(program, dynamo=True, verbose=False).save(path / "hand.onnx")
    converted = time.perf_counter()
    import onnxruntime
    onnxruntime.InferenceSession(path / "hand.onnx", providers=["CPUExecutionProvider"])
    end = time.perf_counter()
    return {"capture": captured - start, "compile": converted - captured, "load": end - converted, "sum": end - start}


def ours(learn, path: Path) -> dict:
    "Seconds of the same three, and of the rest of an export"
    import fastai_compile # noqa: F401, gives `learn.export` the keyword
    start = time.perf_counter()
    with learn.no_bar(): report = learn.export((path / "ours.pkl").resolve(), compile="onnxruntime")
    whole, s = time.perf_counter() - start, report.stages
    rest = {k: v for k, v in s.items() if k not in (*OURS, *GATE)}
    return {**{k: s[k] for k in OURS}, "sum": sum(s[k] for k in OURS), "gate": sum(s[k] for k in GATE), "rest": rest,
            "whole": whole}


def child(side: str, model: str, out: Path) -> None:
    "In a process of its own: one side, once"
    warnings.simplefilter("ignore")
    learn = build(MODELS[model], out.parent / "data", train=False)
    write(out, {"ours": ours, "by hand": by_hand}[side](learn, out.parent))


def measure(model: str, repeats: int, work: Path) -> list:
    "[{'ours': seconds, 'by hand': seconds}] of fresh processes, the two sides in turn"
    res = []
    for i in range(repeats):
        pair = {}
        for side in ("ours", "by hand") if i % 2 == 0 else ("by hand", "ours"):
            out = work / f"{model}.json"
            args = [__file__, "--child", side, "--models", model, "--out", str(out)]
            subprocess.run([sys.executable, "-W", "ignore", *args], env=child_env(), check=True, stdout=subprocess.DEVNULL)
            pair[side] = json.loads(out.read_text())
        res.append(pair)
        print(f"{model}, repeat {i + 1}: ours {pair['ours']['sum']:.2f} s, by hand {pair['by hand']['sum']:.2f} s, "
              f"the gate {pair['ours']['gate']:.2f} s", flush=True)
    return res


def summary(pairs: list) -> dict:
    "Medians of the sides, and the ratio with its smallest and largest repeat"
    def median(side, key): return statistics.median(p[side][key] for p in pairs)
    def stages(side): return {k: median(side, k) for k in (*OURS, "sum")}
    ratios = [p["ours"]["sum"] / p["by hand"]["sum"] for p in pairs]
    return {"ours_s": stages("ours"), "by_hand_s": stages("by hand"), "ratio": statistics.median(ratios),
            "ratio_low": min(ratios), "ratio_high": max(ratios), "holds": statistics.median(ratios) <= TARGET,
            "gate_s": median("ours", "gate"), "whole_export_s": median("ours", "whole")}


def describe(data: dict) -> str:
    "The result as Markdown"
    rows, lines = [], []
    for model, m in data["models"].items():
        s = m["summary"]
        for side, t in (("`compile='onnxruntime'`", s["ours_s"]), ("by hand", s["by_hand_s"])):
            rows.append({"model": model, "": side, "capture s": f"{t['capture']:.2f}", "conversion s": f"{t['compile']:.2f}",
                         "session s": f"{t['load']:.2f}", "sum s": f"{t['sum']:.2f}"})
        lines += [f"- {model}: {s['ratio']:.2f} times the time by hand ({s['ratio_low']:.2f} to {s['ratio_high']:.2f}, "
                  f"{len(m['repeats'])} repeats); at most {TARGET} {'holds' if s['holds'] else 'DOES NOT HOLD'}",
                  f"- {model}: the gate took {s['gate_s']:.2f} s, the whole export {s['whole_export_s']:.2f} s"]
    return "\n\n".join([table(rows), "\n".join(lines), timed(data["run"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parse(parser, RESULTS / "overhead.json", describe)
    if args is None: return 0
    if args.child: return child(args.child, args.models[0], args.out) or 0
    data = {"run": facts(), "models": {}}
    with tempfile.TemporaryDirectory() as tmp:
        for model in args.models:
            pairs = measure(model, args.repeats, Path(tmp))
            data["models"][model] = {"summary": summary(pairs), "repeats": pairs}
    write(args.out, data)
    print(describe(data))
    return 0 if all(m["summary"]["holds"] for m in data["models"].values()) else 1


if __name__ == "__main__": sys.exit(main())
