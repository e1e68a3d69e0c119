"""The process of a local AWS: moto's server on loopback. It proves nothing of what AWS itself checks."""

import argparse
import json
import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from shipyard.local.cloudformation import lift, modelled


def main(arguments: list[str] | None = None) -> int:
    """Serve on loopback until the process is ended; print one line of JSON with the address once it answers."""
    parser = argparse.ArgumentParser(prog="python -m shipyard.local.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on loopback (default: a free one)")
    chosen = parser.parse_args(arguments)
    lift()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", chosen.port, app, threaded=True, request_handler=MotoRequestHandler)
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}", "modelled": modelled()}), flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
