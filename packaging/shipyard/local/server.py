"""The process of a local AWS: moto's server on loopback. It proves nothing of what AWS itself checks."""

import argparse
import json
import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from shipyard.local.cloudformation import lift, modelled
from shipyard.local.edge import open_greengrass
from shipyard.local.faults import controlled


def main(arguments: list[str] | None = None) -> int:
    """Serve on loopback until the process is ended; print one line of JSON with the addresses once it answers."""
    parser = argparse.ArgumentParser(prog="python -m shipyard.local.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on loopback (default: a free one)")
    parser.add_argument("--account", nargs=2, action="append", default=[], metavar=("ACCOUNT", "REGION"),
                        help="an account that has devices, and where; may be given several times")  # fmt: skip
    chosen = parser.parse_args(arguments)
    lift()
    app = controlled(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", chosen.port, app, threaded=True, request_handler=MotoRequestHandler)
    greengrass = {account: open_greengrass(account, region) for account, region in chosen.account}
    url = f"http://127.0.0.1:{server.server_port}"
    print(json.dumps({"url": url, "greengrass": greengrass, "modelled": modelled()}), flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
