"""A nucleus' IPC on a Unix socket: event-stream RPC frames, answered as Greengrass documents them, for the real client.

Frame: lengths of all and of the headers, CRC-32 of both, headers, payload, CRC-32 of all before ("Amazon event stream
encoding"). Message types: 0 application, 4 connect, 5 its acknowledgement; flag 1 accepts a connection, 2 ends a stream.
"""

import base64
import json
import socketserver
import struct
import threading
import zlib

CONNECT, ACKNOWLEDGED = 4, 5
ACCEPTED, ENDED = 1, 2
SUBSCRIPTIONS = {"SubscribeToTopic": "topic", "SubscribeToIoTCore": "topicName"}


def frame(headers, payload):
    packed = b""
    for name, value in headers.items():
        packed += struct.pack("!B", len(name)) + name.encode()
        if isinstance(value, int):
            packed += struct.pack("!Bi", 4, value)
        else:
            packed += struct.pack("!BH", 7, len(value)) + value.encode()
    prelude = struct.pack("!II", 16 + len(packed) + len(payload), len(packed))
    whole = prelude + struct.pack("!I", zlib.crc32(prelude)) + packed + payload
    return whole + struct.pack("!I", zlib.crc32(whole))


def unpack(packed):
    found = {}
    while packed:
        size = packed[0]
        name, kind, packed = packed[1 : 1 + size].decode(), packed[1 + size], packed[2 + size :]
        if kind == 4:
            found[name], packed = struct.unpack("!i", packed[:4])[0], packed[4:]
        else:
            assert kind == 7, (name, kind)
            size = struct.unpack("!H", packed[:2])[0]
            found[name], packed = packed[2 : 2 + size].decode(), packed[2 + size :]
    return found


class Connection(socketserver.StreamRequestHandler):
    """One component's connection."""

    def handle(self):
        self.server.connections.append(self)
        while len(prelude := self.rfile.read(12)) == 12:
            size, headers_size, check = struct.unpack("!III", prelude)
            assert check == zlib.crc32(prelude[:8])
            rest = self.rfile.read(size - 12)
            assert struct.unpack("!I", rest[-4:])[0] == zlib.crc32(prelude + rest[:-4])
            self.take(unpack(rest[:headers_size]), rest[headers_size:-4])

    def take(self, headers, payload):
        stream = headers[":stream-id"]
        if headers[":message-type"] == CONNECT:
            assert json.loads(payload) == {"authToken": self.server.token}
            self.say(0, ACKNOWLEDGED, ACCEPTED, {})
            return
        if "operation" not in headers:
            return  # the client ends a stream
        operation = headers["operation"].removeprefix("aws.greengrass#")
        document = json.loads(payload)
        self.server.calls.append((operation, document))
        listens = operation in SUBSCRIPTIONS
        self.say(stream, 0, 0 if listens else ENDED, {"service-model-type": f"aws.greengrass#{operation}Response"}, {})
        if listens:
            self.server.streams[operation, document[SUBSCRIPTIONS[operation]]] = self, stream
        with self.server.changed:
            self.server.changed.notify_all()

    def say(self, stream, kind, flags, headers, document=None):
        text = b"" if document is None else json.dumps(document).encode()
        told = {":message-type": kind, ":message-flags": flags, ":stream-id": stream, **headers}
        if document is not None:
            told[":content-type"] = "application/json"
        self.wfile.write(frame(told, text))


class Nucleus(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Listens at `path`; `calls` are the operations that it heard."""

    daemon_threads = True

    def __init__(self, path, token="token"):
        super().__init__(str(path), Connection)
        self.token, self.calls, self.streams, self.connections = token, [], {}, []
        self.changed = threading.Condition()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def wait(self, operation, count=1):
        """Return the documents of an operation once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.heard(operation)) >= count, timeout=20), self.calls
        return self.heard(operation)

    def heard(self, operation):
        return [document for name, document in list(self.calls) if name == operation]

    def local(self, topic, payload):
        """Publish on a local topic."""
        connection, stream = self.streams["SubscribeToTopic", topic]
        event = {"binaryMessage": {"message": base64.b64encode(payload).decode(), "context": {"topic": topic}}}
        kind = {"service-model-type": "aws.greengrass#SubscriptionResponseMessage"}
        connection.say(stream, 0, 0, kind, event)

    def core(self, topic, payload):
        """Pass on what the center published."""
        connection, stream = self.streams["SubscribeToIoTCore", topic]
        event = {"message": {"topicName": topic, "payload": base64.b64encode(payload).decode()}}
        connection.say(stream, 0, 0, {"service-model-type": "aws.greengrass#IoTCoreMessage"}, event)

    def cut(self):
        """End every connection, as a nucleus that stops."""
        for connection in self.connections:
            connection.connection.shutdown(2)
