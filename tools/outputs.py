"""Cell outputs without terminal codes, progress bars, routine warnings, memory addresses and machine paths."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_START, _END = r"(?<![\w/.~<$-])", r"(?=[/\s'\"`),:;\]<]|$)"
_PATHS = [
    (re.compile(r"(?:/[^\s'\"<>:,()/]+)*/site-packages/"), "site-packages/"),
    (re.compile(r"(?:/[^\s'\"<>:,()/]+)*/(lib/python3\.\d+/)"), r"\1"),
    (re.compile(_START + re.escape(str(ROOT)) + "/"), ""),
    (re.compile(_START + re.escape(str(ROOT)) + _END), "."),
    (re.compile(_START + r"(?:/private)?(?:/var/folders/\w+/\w+/T|/var/tmp|/tmp)/ipykernel_\d+/\d+\.py"), "<cell>"),
    (re.compile(_START + r"(?:/private)?(?:/var/folders/\w+/\w+/T|/var/tmp|/tmp)/(?:tmp|pytest-)[\w-]*"), "$TMPDIR"),
    (re.compile(_START + r"(?:/home/[\w.-]+|/Users/[\w.-]+|/root|" + re.escape(str(Path.home())) + ")" + _END), "~"),
]
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,}")
_BAR = re.compile(r"^.*\d+%\|[^|]*\| \d+/.*$|^(?:Epoch \d+/\d+ : )?\|[-█ ]*\|\s*\d+(?:\.\d+)?%.*$", re.MULTILINE)
_WARNING = re.compile(r"^site-packages/\S+:\d+: (?:(?:Future|\w*Deprecation|Tqdm)Warning:"
                      r"|UserWarning: The given NumPy array is not writable).*\n?(?:  .*\n?)?", re.MULTILINE)
_NOISE = re.compile(r"<style.*?</style>|<script.*?</script>|<progress.*?</progress>|<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_SHOWS = re.compile(r"<(?:img|svg|video|audio|canvas)\b")
_PLACEHOLDER = re.compile(r"<IPython\.core\.display\.\w+ object>")


def scrub(text: str) -> str:
    "`text` without terminal codes, memory addresses and paths of this machine"
    text = _ADDRESS.sub("", _ANSI.sub("", text))
    for pattern, new in _PATHS: text = pattern.sub(new, text)
    return text


def _stream(text: str) -> str:
    "`text` as a terminal leaves it: overwritten lines and finished progress bars are gone"
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in _ANSI.sub("", text).split("\n")]
    kept = [line for line in lines if not _BAR.match(line)]
    return "\n".join(kept)


def plain_html(html: str) -> str:
    "`html` without what breaks it inside Markdown: styles, scripts, blank or indented lines; empty if nothing is left"
    html = _NOISE.sub("", html)
    if not _TAG.sub("", html).strip() and not _SHOWS.search(html): return ""
    if "<pre" in html: return re.sub(r"\n\s*\n", "\n", html).strip()
    return "\n".join(line.strip() for line in html.splitlines() if line.strip())


def _tidy_data(data: dict, render: bool) -> dict:
    data = {k: v for k, v in data.items() if k != "application/vnd.jupyter.widget-view+json"}
    data = {k: scrub(v) if k.startswith("text/") and isinstance(v, str) else v for k, v in data.items()}
    if "text/html" in data:
        html = plain_html(data["text/html"])
        if not html: del data["text/html"]
        else:
            if render: data["text/html"] = html
            if data.get("text/markdown", "").startswith("```html"): del data["text/markdown"] # the same again, as source
    if set(data) == {"text/plain"} and _PLACEHOLDER.fullmatch(data["text/plain"]): return {}
    return data


def tidy(outputs: list, render: bool = False) -> list:
    "`outputs` without noise, neighbouring streams joined; for `render` with HTML that Markdown viewers understand too"
    res: list = []
    for o in outputs:
        kind = o["output_type"]
        if kind == "stream":
            if res and res[-1]["output_type"] == "stream" and res[-1]["name"] == o["name"]: res[-1]["text"] += o["text"]
            else: res.append(type(o)(o))
        elif kind == "error":
            name, message = scrub(o["ename"]), scrub(o["evalue"])
            res.append(type(o)({**o, "ename": name, "evalue": message, "traceback": [f"{name}: {message}"]}))
        else:
            data = _tidy_data(dict(o["data"]), render)
            if data and not (set(o["data"]) - set(data) and set(data) <= {"text/plain"}):
                res.append(type(o)({**o, "data": data}))
    for o in res:
        if o["output_type"] == "stream": o["text"] = _WARNING.sub("", scrub(_stream(o["text"])))
    return [o for o in res if o["output_type"] != "stream" or o["text"].strip()]
