"""Kernels of Jupyter that are forked from one process which has imported fastai."""
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from tools.outputs import ROOT
from tools.warm import run_module, warm_up


def _become_kernel(ask: dict) -> None:
    "The forked process: a session and an environment of its own"
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1): os.dup2(nothing, fd)
    os.environ.clear()
    os.environ.update(ask["env"] | {"JPY_PARENT_PID": str(os.getppid())})
    import matplotlib
    matplotlib.use("module://matplotlib_inline.backend_inline")
    run_module("ipykernel_launcher", ask["args"], ask["cwd"])


def serve() -> None:
    "Warm up, then fork a kernel for each line of stdin, and print its process id"
    warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody has to collect the kernels that ended
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try: _become_kernel(json.loads(line))
            finally: os._exit(0)
        print(pid, flush=True)


class _Forked:
    "A forked kernel, in the words of `subprocess.Popen`"
    stdin = stdout = stderr = None

    def __init__(self, pid: int): self.pid = pid

    def poll(self) -> int | None:
        try: os.kill(self.pid, 0)
        except ProcessLookupError: return 0
        return None

    def wait(self) -> int: return 0 # called when `poll` has said that it ended

    def send_signal(self, signum: int) -> None: os.kill(self.pid, signum)

    def terminate(self) -> None: self.send_signal(signal.SIGTERM)

    def kill(self) -> None: self.send_signal(signal.SIGKILL)


class ForkedProvisioner(LocalProvisioner):
    "Kernels from `serve`, which is started with the first one"
    server = None

    async def launch_kernel(self, cmd: list[str], **kwargs) -> dict:
        env, cls = kwargs["env"], type(self)
        if cls.server is None:
            command = [sys.executable, "-W", "ignore", "-c", "from tools.kernels import serve; serve()"]
            cls.server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ask = {"args": cmd[cmd.index("ipykernel_launcher") + 1:], "env": env, "cwd": str(kwargs["cwd"])}
        print(json.dumps(ask), file=cls.server.stdin, flush=True)
        self.process = _Forked(int(cls.server.stdout.readline()))
        self.pid = self.pgid = self.process.pid
        self.cwd = kwargs["cwd"]
        return self.connection_info


def use_forked_kernels() -> None:
    "From now on, kernels that this process starts are forked"
    entry = EntryPoint("forked", f"{__name__}:{ForkedProvisioner.__name__}", KernelProvisionerFactory.GROUP_NAME)
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[entry.name] = entry
    factory.default_provisioner_name = entry.name


def use_fresh_kernels() -> None:
    "From now on, kernels that this process starts are new processes again"
    KernelProvisionerFactory.instance().default_provisioner_name = "local-provisioner"
    server, ForkedProvisioner.server = ForkedProvisioner.server, None
    if server: server.communicate()
