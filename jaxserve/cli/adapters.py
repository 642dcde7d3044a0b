"""`jaxserve lora list`, `load` and `unload`: the adapters of a server that runs."""

from __future__ import annotations

import argparse
import sys

from jaxserve.cli.remote import add_server, ask


def add_load(command: argparse.ArgumentParser) -> None:
    """The arguments of `lora load`."""
    command.add_argument("name", help="by which requests ask for it")
    command.add_argument("source", help="the server's directory, gs:// or s3:// address")
    command.add_argument(
        "--replace", action="store_true", help="replace the adapter of that name (load_inplace)"
    )
    add_server(command)


def add_unload(command: argparse.ArgumentParser) -> None:
    """The arguments of `lora unload`."""
    command.add_argument("name")
    command.add_argument(
        "--refuse-in-use", action="store_true", help="fail where requests run with it"
    )
    add_server(command)


def list_adapters(arguments: argparse.Namespace) -> int:
    """Prints name, hash and source of each adapter; raises as `remote.ask`."""
    for card in ask(arguments, "/v1/models")["data"]:
        if card.get("parent"):
            digest = (card.get("hash") or "not fetched")[:12]
            sys.stdout.write(f"{card['id']}\t{digest}\t{card['root']}\n")
    return 0


def load_adapter(arguments: argparse.Namespace) -> int:
    """Gives a name to an adapter; raises as `remote.ask`."""
    body = {"lora_name": arguments.name, "lora_path": arguments.source}
    card = ask(arguments, "/v1/load_lora_adapter", body | {"load_inplace": arguments.replace})
    sys.stdout.write(f"{card['id']}\t{(card.get('hash') or 'not fetched')[:12]}\t{card['root']}\n")
    return 0


def unload_adapter(arguments: argparse.Namespace) -> int:
    """Takes a name away; raises as `remote.ask`. Returns 1 if requests still run with it."""
    body = {"lora_name": arguments.name}
    if arguments.refuse_in_use:
        body["in_use"] = "refuse"
    if ask(arguments, "/v1/unload_lora_adapter", body)["ended"]:
        return 0
    sys.stderr.write(f"jaxserve: {arguments.name} is unloaded, but requests still run with it\n")
    return 1


#: By the command's last word: what it does, its arguments, and how it runs.
ACTIONS = {
    "list": ("the adapters of a server that runs", add_server, list_adapters),
    "load": ("give a name to an adapter on a server that runs", add_load, load_adapter),
    "unload": ("take an adapter's name away on a server that runs", add_unload, unload_adapter),
}
