#!/bin/sh
# What a cluster of deploy/compose.yaml needs before its first start: keys for the bucket, and volumes that
# belong to whoever writes to them. It runs at each `up`, and leaves what is there.
set -eu
umask 077

# data USER DIRECTORY...: the directories are that user's alone. Once: later, somebody is writing in them.
data() {
  user=$1
  shift
  for directory; do
    if [ "$(stat -c %u "$directory")" != "$user" ]; then
      chmod 700 "$directory"
      chown -R "$user:$user" "$directory"
    fi
  done
}

# secrets USER DIRECTORY...: the same for what only this script writes.
secrets() {
  user=$1
  shift
  chmod 700 "$@"
  chown -R "$user:$user" "$@"
}

random() { # bytes, as hex
  od -A n -N "$1" -t x1 /dev/urandom | tr -d ' \n'
}

# The bucket is a directory of the S3 server.
mkdir -p /volumes/s3-data/emberline
key=/volumes/s3-key
if ! [ -e "$key/credentials" ]; then
  id=$(random 10)
  secret=$(random 20)
  printf 'ROOT_ACCESS_KEY=%s\nROOT_SECRET_KEY=%s\nexport ROOT_ACCESS_KEY ROOT_SECRET_KEY\n' "$id" "$secret" >"$key/server.env"
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$id" "$secret" >"$key/credentials.new"
  # The last of the two to come: it says that both are whole.
  mv "$key/credentials.new" "$key/credentials"
fi

[ -e /volumes/grafana-password/password ] || random 12 >/volumes/grafana-password/password

secrets 65532 "$key"
secrets 472 /volumes/grafana-password
data 65532 /volumes/etcd-1 /volumes/etcd-2 /volumes/etcd-3 /volumes/s3-data
data 65534 /volumes/prometheus
data 472 /volumes/grafana
data 10001 /volumes/jaeger
