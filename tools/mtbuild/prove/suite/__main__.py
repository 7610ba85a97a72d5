"""The smoke suite, as it runs inside an image: `python3 /mtbuild/suite --request /mtbuild/request.json`.

Standard library and what the image has; nothing is installed and nothing of mtbuild is imported. Each check
runs in its own process and is killed at its limit, so that a hang or a crash costs one result. Lines of JSON
on stdout are progress only; what counts is report.json. Exit status: 0 every required check passed, 1 one
did not, 2 the request can't be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import runner


def main() -> int:
    """Run what the request asks for, or one check of it."""
    parser = argparse.ArgumentParser(prog="suite", description=__doc__.splitlines()[0])
    parser.add_argument("--request", type=Path, help="the host's request (request.schema.json)")
    parser.add_argument("--check", help="run this check in this process, and write its result to --fd")
    parser.add_argument("--fd", type=int, help="where --check writes its result")
    parser.add_argument("--list", action="store_true", help="print every check with its tiers and limit")
    options = parser.parse_args()
    if options.list:
        print(json.dumps([runner.describe(check) for check in runner.checks().values()]))
        return 0
    if options.request is None:
        parser.error("--request is needed")
    try:
        request = json.loads(options.request.read_text(encoding="utf-8"))
        if request["schema"] != 1:
            print(f"the request has schema {request['schema']}; this suite reads 1", file=sys.stderr)
            return 2
    except (OSError, ValueError, KeyError) as error:
        print(f"can't use the request {options.request}: {error!r}", file=sys.stderr)
        return 2
    if options.check:
        return runner.run_here(request, options.check, options.fd)
    return runner.run_all(request, options.request)


if __name__ == "__main__":
    sys.exit(main())
