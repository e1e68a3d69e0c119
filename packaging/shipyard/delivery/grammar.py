"""The grammar of the verbs of delivery, from an approval to what is live."""

import argparse
from pathlib import Path

VERBS = {
    "approve": "sign that a release may run in an environment, into releases/approvals/",
    "promote": "copy an environment's release to another one, record it, and name it in fleet.toml",
    "rollback": "go back to the release before the last promotion, record it, and name it in fleet.toml",
    "rollout": "deploy an environment's release to all targets in turn, and return all where one fails",
    "status": "tell what is live in an environment against what its release says",
    "challenge": "compare a challenger with the champion on what shoppers did: promote, stop or go on",
    "rehearse": "walk two releases through all environments and back on this machine, with a fault in each step",
}

MORE = {
    "approve": "The gates of fleet.toml are held against the release's figures first, and written into the approval. "
    "The key must be one of releases/keys/approvers/, and none that signs releases.",
    "promote": "Objects are copied by way of this machine, each held to its digest; what is there is not sent again. "
    "Two at once: one wins, the other is told. The same command twice, or after a kill, goes on where it stopped.",
    "rollback": "Nothing is copied: what the bucket holds of the release is read and compared. Deploy afterwards, as after "
    "a promotion.",
    "rollout": "GPU, CPU, gateway, edge, then what else there is; each is held against what is live before the next. "
    "Where one fails, all return to the last good release. A run that was killed goes on by the same command, or returns "
    "by --return.",
    "status": "Asks SageMaker, ECS and Greengrass, and the last recorded promotion. Ends with 3 where they differ.",
    "challenge": "May be looked at as often as one likes: the interval holds at every look. An arm is hits/shown, as "
    "120/2400, or the folder of what its gateway has written, of which each shopper's first request counts. With "
    "--exit-code it ends with 0 to promote, 3 to stop, 4 to go on.",
    "rehearse": "These verbs and the CDK CLI are the real ones, AWS is an imitation on loopback. After each step status "
    "has to say that all targets are on one release. The second release is made of the first. Writes below build/rehearsal.",
}

EXIT = "exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 3 what is live is not the release (status)"


def parser() -> argparse.ArgumentParser:
    """Return the grammar of the verbs of delivery."""
    top = argparse.ArgumentParser(prog="shipyard")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(verb: str, *, signs: bool = False) -> argparse.ArgumentParser:
        words = f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}. {MORE[verb]}"
        one = verbs.add_parser(verb, help=VERBS[verb], description=words, epilog=EXIT)
        one.add_argument("--fleet", type=Path, default=Path("fleet.toml"), help="configuration (default: ./fleet.toml)")
        one.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        if signs:
            one.add_argument("--by", metavar="WHO", help="who asks for it, as it is recorded (default: the key's id)")
            one.add_argument(
                "--dry-run", action="store_true", help="check all, tell what would be done, change nothing"
            )
        return one

    approving = add("approve", signs=True)
    approving.add_argument("version", help="version of a release in releases/, e.g. 0.1.0-g0123456789ab")
    approving.add_argument("env", help="the environment of fleet.toml that it may run in")
    approving.add_argument("--key", metavar="KEY", help="private key in PEM, or kms:KEY for one in AWS KMS (default: "
                           "$XDG_CONFIG_HOME/shipyard/approving.pem, or ~/.config, made on first use)")  # fmt: skip
    promoting = add("promote", signs=True)
    promoting.add_argument("source", metavar="FROM", help="the environment whose release is taken")
    promoting.add_argument("env", metavar="TO", help="the environment that gets it")
    promoting.add_argument("--release", metavar="VERSION", help="another release, which FROM's bucket holds")
    returning = add("rollback", signs=True)
    returning.add_argument("env", help="an environment of fleet.toml")
    returning.add_argument("--to", metavar="VERSION", help="the release to go back to")
    for one in (promoting, returning):
        one.add_argument("--key", metavar="KEY", help="private key of a release signer (default: signing.pem there)")
        one.add_argument("--allow-older", action="store_true",
                         help="also a release older than what runs, or before project.minimum_sequence")  # fmt: skip
    rolling = add("rollout")
    rolling.add_argument("env", help="an environment of fleet.toml")
    rolling.add_argument("--good", metavar="VERSION", help="the release to return to (default: that of the last rollout, or "
                         "what the last promotion replaced)")  # fmt: skip
    rolling.add_argument("--return", dest="give_up", action="store_true", help="return an unfinished rollout")
    rolling.add_argument("--by", metavar="WHO", default="shipyard rollout", help="who rolls out, as it is recorded")
    rolling.add_argument("--wait", type=float, default=1800.0, help="seconds for a target to be ready (default: 1800)")
    judging = add("challenge")
    for arm in ("champion", "challenger"):
        judging.add_argument(f"--{arm}", required=True, metavar="ARM", help="hits/shown, or a folder of *.jsonl")
    judging.add_argument("--expect", type=float, default=0.01, help="size of the difference that is expected, chosen "
                         "before the first look (default: 0.01)")  # fmt: skip
    judging.add_argument("--least", type=float, default=0.0, help="smallest difference that counts (default: 0)")
    judging.add_argument("--alpha", type=float, default=0.05, help="probability of a wrong interval (default: 0.05)")
    judging.add_argument("--most", type=int, help="outcomes after which an undecided comparison stops (default: none)")
    judging.add_argument("--share", type=float, help="part of traffic that the challenger should have, checked")
    judging.add_argument("--kinds", default="click,cart,purchase", help="feedback that is a hit (default: all)")
    judging.add_argument("--settle", type=float, default=3600.0, help="seconds that feedback has time (default: 3600)")
    judging.add_argument("--exit-code", action="store_true", help="tell the decision by the exit code")
    rehearsing = add("rehearse")
    rehearsing.add_argument("release", type=Path, nargs="?", help="a release file whose artifacts lie in build/store "
                            "(default: the newest of build/releases/)")  # fmt: skip
    rehearsing.add_argument("--env", help="where faults are injected (default: the second environment of the way)")
    rehearsing.add_argument("--faults", metavar="CASES", help="cases to inject, as gpu:fails,rest:falls; none for none "
                            "(default: all)")  # fmt: skip
    looking = add("status")
    looking.add_argument("env", help="an environment of fleet.toml")
    return top
