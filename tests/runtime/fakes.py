"""Children that do what a test asks of them: `python -m tests.runtime.fakes <config file> <behaviour>`."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo
from manylora.runtime.messages import ChildFailed

REPOSITORY = Path(__file__).resolve().parents[2]


def main(config: ServerConfig, context: ChildContext) -> None:
    match context.args[0]:
        case "serve":
            context.ready()
            context.supervisor.wait()
        case "refuse":
            raise ConfigError("the moon is full", param="moon")
        case "refuse-with-thread":
            threading.Thread(target=time.sleep, args=(3600,)).start()
            raise ConfigError("the moon is full")
        case "break":
            raise ZeroDivisionError("one\ntwo")
        case "fork":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            context.supervisor.send(ChildFailed(ErrorInfo("", str(child.pid), os.getpid())))
            child.returncode = 0  # it is left behind on purpose
        case behaviour:
            raise AssertionError(behaviour)


if __name__ == "__main__":
    run_child("worker0", sys.argv[1:], main)
