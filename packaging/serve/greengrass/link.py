"""The thin shells over the wire: MQTT by paho, and the nucleus' own IPC, which passes MQTT on."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from serve.errors import ShipyardError

Hear = Callable[[str, bytes], None]

log = logging.getLogger("edge")


class Link(Protocol):
    """A way to the center: at least once, in any order, or not at all."""

    def open(self, topics: tuple[str, ...], hear: Hear, connected: Callable[[], None]) -> None:
        """Subscribe to `topics`, now and after each reconnection; `connected` tells of each."""
        ...

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send what can be sent now; say whether it was taken."""
        ...

    def listen(self, topic: str, hear: Hear) -> None:
        """Hear what this device's own programs say on a local topic."""
        ...

    def tell(self, topic: str, payload: bytes) -> None:
        """Say something to this device's own programs, once at most."""
        ...

    def running(self) -> None:
        """Tell the supervisor that the self-test has passed."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class NoLink:
    """A device that is on its own."""

    def open(self, topics: tuple[str, ...], hear: Hear, connected: Callable[[], None]) -> None:
        """Do nothing: nobody speaks."""

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send nothing."""
        return False

    def listen(self, topic: str, hear: Hear) -> None:
        """Hear nobody: local clients have loopback."""

    def tell(self, topic: str, payload: bytes) -> None:
        """Tell nobody."""

    def running(self) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """Let go of nothing."""


class MqttLink:
    """A broker by host and port, without a nucleus: a gateway of the store's own, and the simulation."""

    def __init__(self, thing: str, host: str, port: int) -> None:
        self._address = (host, port)
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=thing, clean_session=True)
        self._client.reconnect_delay_set(1, 60)
        # what waits is of no use later: the next report says it again
        self._client.max_queued_messages_set(8)
        self._local: dict[str, Hear] = {}

    def open(self, topics: tuple[str, ...], hear: Hear, connected: Callable[[], None]) -> None:
        """Connect in the background, for as long as it takes."""

        def greet(client: mqtt.Client, _: Any, flags: Any, reason: Any, properties: Any) -> None:
            if not reason.is_failure:
                client.subscribe([(topic, 1) for topic in (*topics, *self._local)])
                connected()

        self._client.on_connect = greet
        self._client.on_message = lambda _, __, message: self._local.get(message.topic, hear)(
            message.topic, bytes(message.payload)
        )
        self._client.connect_async(*self._address, keepalive=30)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send with QoS 1 when connected."""
        return self._client.is_connected() and self._client.publish(topic, payload, qos=1).rc == mqtt.MQTT_ERR_SUCCESS

    def listen(self, topic: str, hear: Hear) -> None:
        """Hear local clients by the same broker, from the next connection on: before `open`."""
        self._local[topic] = hear

    def tell(self, topic: str, payload: bytes) -> None:
        """Send with QoS 0."""
        self._client.publish(topic, payload)

    def running(self) -> None:
        """Tell nobody: there is no nucleus."""

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


class IpcLink:
    """The nucleus, classic or lite, by its mqttproxy and pubsub; `lost` is called when its stream ends."""

    def __init__(self, lost: Callable[[], None]) -> None:
        # not at the top: a device without a nucleus does without
        from awsiot.greengrasscoreipc.clientv2 import GreengrassCoreIPCClientV2

        self._lost = lost
        try:
            self._client = GreengrassCoreIPCClientV2()
        except Exception as fault:
            raise ShipyardError(f"nucleus: {fault}", mend="start this by the component's recipe") from None

    def open(self, topics: tuple[str, ...], hear: Hear, connected: Callable[[], None]) -> None:
        """Subscribe to each topic; the nucleus keeps the connection to the center."""

        def heard(event: Any) -> None:
            hear(event.message.topic_name, event.message.payload)

        for topic in topics:
            self._client.subscribe_to_iot_core(
                topic_name=topic, qos="1", on_stream_event=heard, on_stream_closed=self._lost
            )
        connected()

    def publish(self, topic: str, payload: bytes) -> bool:
        """Send with QoS 1; offline, nucleus lite refuses."""
        try:
            self._client.publish_to_iot_core(topic_name=topic, qos="1", payload=payload)
        except Exception as fault:  # the client raises a class of its own for each answer of the service
            log.info("not published: %s", fault)
            return False
        return True

    def listen(self, topic: str, hear: Hear) -> None:
        """Subscribe to a local topic of the nucleus."""

        def heard(event: Any) -> None:
            hear(topic, event.binary_message.message if event.binary_message is not None else b"")

        self._client.subscribe_to_topic(topic=topic, on_stream_event=heard, on_stream_closed=self._lost)

    def tell(self, topic: str, payload: bytes) -> None:
        """Publish on a local topic of the nucleus."""
        from awsiot.greengrasscoreipc.model import BinaryMessage, PublishMessage

        try:
            message = PublishMessage(binary_message=BinaryMessage(message=payload))
            self._client.publish_to_topic(topic=topic, publish_message=message)
        except Exception as fault:  # the client raises a class of its own for each answer of the service
            log.info("not told: %s", fault)

    def running(self) -> None:
        """Report RUNNING: this ends the recipe's startup phase, and the deployment succeeds."""
        self._client.update_state(state="RUNNING")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
