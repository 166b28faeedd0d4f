"""A PostgreSQL server of its own for as long as its standard input is open; it prints its URL.

    python throwaway_postgres.py [--durable]

It listens on a Unix socket in a temporary folder, which goes with it. Root, as whom PostgreSQL does not
run, starts it as the user `postgres` or `nobody`. Without --durable nothing is forced to the disk.
Exits with 3 where there is no PostgreSQL.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOT_INSTALLED = 3
WAIT_S = 300  # where many tests share a core
IN_A_HURRY = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


def main() -> int:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: len(path))
    initdb = shutil.which("initdb") or (found[-1] if found else None)
    if initdb is None:
        return NOT_INSTALLED
    # However it is told to end, the server and its folder are not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    programs = Path(initdb).resolve().parent
    with tempfile.TemporaryDirectory(prefix="sam-train-pg-") as folder:
        settings = ["max_connections=60", "listen_addresses="]
        settings += [] if "--durable" in sys.argv else IN_A_HURRY
        server = start(programs, Path(folder), settings)
        try:
            wait_for(programs, folder, server)
            print(f"postgresql://postgres@/postgres?host={folder}", flush=True)
            sys.stdin.read()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(WAIT_S)
    return 0


def start(programs: Path, folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """Makes a cluster and starts its server."""
    data, user = folder / "data", None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        shutil.chown(folder, user)
    as_user = {"user": user, "extra_groups": []} if user else {}
    make = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
    make += ["--locale=C.UTF-8", "--no-sync"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)  # type: ignore[call-overload]
    run = [programs / "postgres", "-D", data, "-k", folder]
    run += [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("wb") as log:
        # In a session of its own: Ctrl-C in a terminal is for the tests, which then end it.
        return subprocess.Popen(  # type: ignore[call-overload]
            run, stdout=log, stderr=log, cwd=folder, start_new_session=True, **as_user
        )


def wait_for(programs: Path, folder: str, server: subprocess.Popen[bytes]) -> None:
    """Returns once the server takes connections."""
    deadline = time.monotonic() + WAIT_S
    ask = [programs / "pg_isready", "-q", "-h", folder]
    while subprocess.run(ask, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start:\n{Path(folder, 'log').read_text()}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
