#!/usr/bin/env python3
"""Fills in jobset.yaml and svc-acct.yaml for one run, and hands them to kubectl.

    python launch/gke/render.py --name=cpc-11m --nodes=4 --gpu=nvidia-h100-80gb:8 --image=REGISTRY/ecg-jax:1 \\
        --claim=shared --dry-run -- ecg-jax pretrain --config=configs/cpc.py --workdir=/shared/runs/cpc ...

With --dry-run it prints the YAML and calls nothing.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def accelerators(gpu: str | None, tpu: str | None) -> tuple[dict[str, str], dict[str, int]]:
    """What selects the nodes, and what a pod takes of one.

    Args:
        gpu: "TYPE:COUNT", accelerators of a node.
        tpu: "TYPE:TOPOLOGY:COUNT", chips of a node.

    Raises:
        ValueError: not of that form.
    """
    if gpu and (match := re.fullmatch(r"([\w-]+):([1-9]\d*)", gpu)):
        return {"cloud.google.com/gke-accelerator": match[1]}, {"nvidia.com/gpu": int(match[2])}
    if tpu and (match := re.fullmatch(r"([\w-]+):(\d+x\d+(?:x\d+)?):([1-9]\d*)", tpu)):
        nodes = {
            "cloud.google.com/gke-tpu-accelerator": match[1],
            "cloud.google.com/gke-tpu-topology": match[2],
        }
        return nodes, {"google.com/tpu": int(match[3])}
    raise ValueError("give --gpu=TYPE:COUNT or --tpu=TYPE:TOPOLOGY:COUNT, with the accelerators of one node")


def chips(topology: str) -> int:
    """Chips of a TPU slice: "4x4" has 16."""
    product = 1
    for side in topology.split("x"):
        product *= int(side)
    return product


def check(args: argparse.Namespace) -> None:
    """Refuses what Kubernetes or the run would refuse only later.

    Raises:
        ValueError: one sentence about the parameter.
    """
    # Pods are called NAME-workers-0-INDEX-xxxxx, in at most 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        raise ValueError(f"--name={args.name}: up to 40 small letters, digits and '-', a letter first")
    if args.nodes < 1 or args.max_restarts < 0 or args.grace_s < 1:
        raise ValueError("--nodes and --grace-s are at least 1, --max-restarts at least 0")
    nodes, limits = accelerators(args.gpu, args.tpu)
    if topology := nodes.get("cloud.google.com/gke-tpu-topology"):
        on_node = limits["google.com/tpu"]
        if args.nodes * on_node != chips(topology):
            raise ValueError(
                f"--nodes={args.nodes} with {on_node} chips each are not the {chips(topology)} of topology {topology}"
            )
    for field in ("namespace", "claim"):
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", getattr(args, field)):
            raise ValueError(f"--{field}={getattr(args, field)} is no Kubernetes name")
    if not re.fullmatch(r"[\w./:@-]+", args.image):
        raise ValueError(f"--image={args.image} is no image name")
    if args.command[:1] != ["ecg-jax"]:
        raise ValueError("give the command after --, beginning with ecg-jax")
    if "pretrain" in args.command and not any(w.startswith("--workdir=/shared/") for w in args.command):
        raise ValueError("give --workdir=/shared/...: pods keep nothing but what is under /shared")


def render(args: argparse.Namespace) -> tuple[str, str]:
    """The account and the JobSet as YAML. JSON is YAML too, which is how lists and maps get in."""
    nodes, limits = accelerators(args.gpu, args.tpu)
    values = {
        "NAME": args.name,
        "NAMESPACE": args.namespace,
        "NODES": str(args.nodes),
        "MAX_RESTARTS": str(args.max_restarts),
        "GRACE_S": str(args.grace_s),
        "IMAGE": args.image,
        "CLAIM": args.claim,
        "NODE_SELECTOR": json.dumps(nodes),
        "ACCELERATORS": json.dumps(limits),
        # Kubernetes expands $(NAME) in arguments; $$ is a plain dollar.
        "COMMAND": json.dumps([word.replace("$", "$$") for word in args.command]),
    }

    def fill(name: str) -> str:
        return re.sub(r"__([A-Z_]+?)__", lambda match: values[match[1]], (HERE / name).read_text())

    return fill("svc-acct.yaml"), fill("jobset.yaml")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", required=True, help="of the JobSet, and so of the run")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="one process on each")
    parser.add_argument("--gpu", metavar="TYPE:COUNT", help="e.g. nvidia-h100-80gb:8")
    parser.add_argument("--tpu", metavar="TYPE:TOPOLOGY:COUNT", help="e.g. tpu-v5-lite-podslice:4x4:4")
    parser.add_argument("--image", required=True)
    parser.add_argument(
        "--claim", required=True, help="PersistentVolumeClaim, ReadWriteMany, mounted on /shared"
    )
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--max-restarts", type=int, default=20, metavar="N")
    parser.add_argument(
        "--grace-s", type=int, default=120, metavar="SECONDS", help="between SIGTERM and SIGKILL"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("command", nargs="*", help="after --: ecg-jax pretrain ...")
    args = parser.parse_args()
    try:
        check(args)
    except ValueError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 2
    account, jobset = render(args)
    if args.dry_run:
        print(account, jobset, sep="---\n", end="")
        return 0
    # `create` and not `apply`: a run of that name that is there already is refused, not started beside itself.
    for verb, text in (("apply", account), ("create", jobset)):
        done = subprocess.run(["kubectl", verb, "-f", "-"], input=text, text=True, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
