#!/usr/bin/env bash
# Two days of a recommender, from files of clicks to tables that serve:
#
#   docs/pipeline/pipeline.sh [FOLDER]        by default runs/pipeline
#
# Each day is streamed from the disk, trained on two ranks with clusterings, saved to an object store,
# exported, and checked in a fresh process. The second goes on from the first, with new users and
# items and a column more. A call that was interrupted goes on where it was, by --resume.
#
#   STORE   folder or URI for the runs (s3://bucket/clicks); by default a bucket of a server of S3's
#           protocol (moto), which is started here and keeps what it has in memory
#   RANKS   of training, 2
#   ROWS    of a day, 60000
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=${1:-runs/pipeline}
mkdir -p "$work"
if [ -z "${STORE:-}" ]; then
  # It writes the variables by which clients find it, once it is there.
  python "$here/store.py" "$work/store.env" &
  store=$!
  trap 'kill $store' EXIT
  until [ -s "$work/store.env" ]; do
    kill -0 "$store"
    sleep 0.1
  done
  . "$work/store.env"
fi

cce() { python -m cce_torchrec.cli "$@"; }

python "$here/make_days.py" "$work/data" "${ROWS:-60000}"
before=()
for day in 1 2; do
  echo "== day $day"
  cce train --config "$here/day_$day.yaml" --data "$work/data/day-$day" --out "$STORE/day-$day" \
    "${before[@]}" --nproc-per-node "${RANKS:-2}" --resume
  cce inspect "$STORE/day-$day" --fast
  rm -rf "$work/exports/day-$day"
  cce export "$STORE/day-$day" "$work/exports/day-$day" --check
  before=(--warm-start "$STORE/day-$day")
done
