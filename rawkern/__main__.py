"""The command line: python -m rawkern info | check | demo."""

import argparse
import importlib
import sys

COMMANDS = {
    "info": "print versions, devices, compiler and cache, for a bug report",
    "check": "run every op on this machine against PyTorch and print a table of errors",
    "demo": "train a small super-resolution decoder and draw what came out",
}


def main(arguments=None):
    """Runs one command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m rawkern", description="Hand-written CUDA kernels for PyTorch.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    module = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in arguments[:1]:  # the others may need what is not installed
            try:
                module = importlib.import_module(f"rawkern.{name}")
            except ModuleNotFoundError as error:
                if error.name.partition(".")[0] == "rawkern":
                    raise
                parser.error(f"{name} needs {error.name}, which is not installed: pip install 'rawkern[demo]'")
            module.add_arguments(command)
    parsed = parser.parse_args(arguments)
    return module.main(parsed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
