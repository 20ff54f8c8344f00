"""A process with torch and nothing of slimfront, which runs `reload.py` in forks of itself:
most tests that ship a network need not wait five seconds for a new one.

`tests/trainables/shipping/test_shipment.py` has the processes that users have.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from slimfront.trainables.shipping import reload

_SERVER = """
import importlib.util, json, os, sys, traceback
import numpy, onnxruntime, torch, torch._dynamo, torch.export
specification = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reload)
assert not any(name.partition(".")[0] == "slimfront" for name in sys.modules)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            os.chdir(asked["directory"])
            torch.set_num_threads(1)
            reload.main(*asked["arguments"])
        except BaseException:
            with open(asked["said"], "w") as said:
                traceback.print_exc(file=said)
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""


class WarmReloader:
    """Stands in for `shipment.reload_afresh`."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def __call__(self, arguments: list[str]) -> str | None:
        server = self._running()
        assert server.stdin is not None and server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder, "said")
            asked = {"arguments": arguments, "said": str(said), "directory": str(Path.cwd())}
            print(json.dumps(asked), file=server.stdin)
            server.stdin.flush()
            assert server.stdout.readline() == "\n", "the process that reloads files has died"
            return said.read_text() if said.exists() else None

    def _running(self) -> "subprocess.Popen[str]":
        if self.server is None:
            command = [sys.executable, "-P", "-c", _SERVER, str(reload.__file__)]
            self.server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self.server

    def close(self) -> None:
        """Ends the process."""
        if self.server is not None:
            self.server.communicate()
