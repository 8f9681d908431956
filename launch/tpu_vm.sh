#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU slice; makes the slice where there is none, and again when it was
# preempted, until the command is through.
#   launch/tpu_vm.sh [--dry-run] NAME -- ecg-jax pretrain --config=configs/cpc.py --workdir=/shared/runs/cpc ...
# Runs from the top of a clone, whose last commit is what the hosts get. Needs gcloud, logged in.
set -euo pipefail

# CHANGE: project, zone, slice, runtime, and the NFS export that becomes /shared on every host.
PROJECT=${PROJECT:-PROJECT}
ZONE=${ZONE:-ZONE}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
NFS=${NFS:-HOST:/EXPORT}

POLL_S=${POLL_S:-30}
MAX_RESTARTS=${MAX_RESTARTS:-20} # of the command on a slice that lives; preemptions do not count

dry=''
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
if (($# < 3)) || [[ ! $1 =~ ^[a-z][a-z0-9-]*$ || $2 != -- ]]; then
    echo "usage: launch/tpu_vm.sh [--dry-run] NAME -- ecg-jax pretrain --workdir=/shared/... (NAME: small letters)" >&2
    exit 2
fi
name=$1
shift 2

where=(--project="$PROJECT" --zone="$ZONE")
queue=(gcloud compute tpus queued-resources)
hosts=(gcloud compute tpus tpu-vm)
archive=.tpu_vm.$name.tar.gz
log=.tpu_vm.$name.log

run() {
    if [[ -n $dry ]]; then
        printf '%q ' "$@" && printf '\n'
    else
        "$@"
    fi
}
create() {
    run "${queue[@]}" create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$RUNTIME" --spot
}
on_hosts() { run "${hosts[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"; }

install_on_hosts() {
    run git archive --format=tar.gz --output="$archive" HEAD
    run "${hosts[@]}" scp "$archive" "$name:ecg_jax.tar.gz" "${where[@]}" --worker=all
    on_hosts "set -e; mountpoint -q /shared || { sudo mkdir -p /shared; sudo mount -t nfs $NFS /shared; }
mkdir -p ecg_jax; tar -xzf ecg_jax.tar.gz -C ecg_jax; cd ecg_jax
python3 -m venv .venv; .venv/bin/pip install --quiet '.[tpu]'"
}

# A connection that breaks leaves the command running. Before it starts again, the one before is told to save and
# is waited for: a host's lock belongs to the command as long as it lives, and its number is in the file beside.
start_on_hosts() {
    on_hosts "cd ecg_jax; PATH=\$PWD/.venv/bin:\$PATH; exec 9>~/.ecg_jax.lock
flock -n 9 || { kill -TERM \"\$(cat ~/.ecg_jax.pid)\"; flock -w 600 9 || exit 75; }
$(printf '%q ' "$@") & echo \$! >~/.ecg_jax.pid
wait \$!; code=\$?; echo \"\$(hostname): exit code \$code\"; exit \$code"
}

# Empty when there is none. (`describe` fails alike for a slice that is not there and a network that is not.)
state() { "${queue[@]}" list "${where[@]}" --filter="name~/$name\$" --format='value(state.state)'; }

if [[ -n $dry ]]; then
    create
    install_on_hosts
    start_on_hosts "$@"
    exit 0
fi

exec 8>".tpu_vm.$name.lock"
flock -n 8 || {
    echo "tpu_vm.sh: another launch/tpu_vm.sh is looking after $name" >&2
    exit 2
}
restarts=0
unanswered=0
while true; do
    # One question that is not answered must not end a run of days; twenty in a row are a login that expired.
    now=$(state) || now=UNANSWERED
    if [[ $now != UNANSWERED ]]; then
        unanswered=0
    elif ((++unanswered > 20)); then
        echo "tpu_vm.sh: gcloud does not say how $name is; run it again to continue" >&2
        exit 75
    fi
    case $now in
    '') create ;;
    ACTIVE)
        code=0
        { install_on_hosts && start_on_hosts "$@"; } 2>&1 | tee "$log" || code=$?
        if [[ $(state || true) != ACTIVE ]]; then continue; fi
        # What a host's command said counts, not what gcloud made of it; 255 is a connection that broke.
        final=$(sed -n 's/.*: exit code \([0-9]*\)$/\1/p' "$log" |
            awk '$1 != 0 && $1 != 75 && ($1 < 128 || $1 == 130) { print; exit }')
        if [[ -n $final ]]; then exit "$final"; fi
        # A host that is shut down sends SIGTERM, and all save and end with 0 before the slice is seen to be gone.
        if ((code == 0)) && ! grep -q 'run the same command again to continue' "$log"; then exit 0; fi
        restarts=$((restarts + 1))
        if ((restarts > MAX_RESTARTS)); then
            echo "tpu_vm.sh: gave up after $MAX_RESTARTS restarts; run it again to continue" >&2
            exit 75
        fi
        echo "tpu_vm.sh: exit code $code, starting again ($restarts)" >&2
        sleep "$POLL_S"
        ;;
    FAILED | SUSPENDED) run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet ;;
    *)
        echo "tpu_vm.sh: $name is $now" >&2
        sleep "$POLL_S"
        ;;
    esac
done
