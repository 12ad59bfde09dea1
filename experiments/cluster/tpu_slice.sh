#!/bin/bash
# One run on a Cloud TPU slice of spot machines, requested again whenever it is taken away:
#     BUCKET=gs://mine JFED=git+https://... bash tpu_slice.sh --preset cifar10-flexible [other flags]
# It runs where gcloud is, logged in to a project; the slice must be allowed to write to the bucket.
set -u
: "${BUCKET:?}" "${JFED:?}" "${NAME:=jfed}" "${ZONE:=us-west4-a}"
: "${TYPE:=v5litepod-16}" "${RUNTIME:=v2-alpha-tpuv5-lite}"

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
state() { queued describe --format='value(state.state)' 2> /dev/null; }
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# The machines' own Python is older than jfed's.
install="pip install --quiet --user uv && ~/.local/bin/uv tool install --quiet --python 3.12 \
    --with gcsfs 'jfed[tpu] @ $JFED' && ~/.local/bin/jfed prepare cifar10"
run="~/.local/bin/jfed run --distributed --workdir $BUCKET/runs/$NAME $*"

trap 'queued delete --force --quiet' EXIT # however this ends, nothing is left to be paid for
failures=0
until [ "$failures" = 5 ]; do # of a slice that was not taken away
    case $(state) in
        "") queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot ;;
        FAILED | SUSPENDED) queued delete --force --quiet ;;
        ACTIVE)
            on_all "$install" && on_all "$run" && exit
            sleep 60 # by then a slice that is being taken away is no longer active
            [ "$(state)" = ACTIVE ] && failures=$((failures + 1))
            ;;
    esac
    sleep 30
done
exit 1
