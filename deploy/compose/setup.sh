#!/bin/sh
# What a cluster of deploy/compose.yaml needs before its first start: certificates, tokens, keys of the bucket, and
# volumes that belong to whoever writes to them. Each service has a volume of its own with what is for it
# alone. It runs at each `up`, and leaves what is there; certificates with less than four months left are made anew.
set -eu
umask 077
cd /volumes

emberline() {
  /usr/bin/emberline --quiet "$@"
}

# secrets USER SERVICE...: what is for these services, which run as that user.
secrets() {
  user=$1
  shift
  for volume; do
    chmod 700 "secrets-$volume"
    chown -R "$user:$user" "secrets-$volume"
  done
}

# certificate DIRECTORY NAME TO: copied, each file in one step, since others may be reading.
certificate() {
  mkdir -p "$3"
  for file in ca.pem cert.pem key.pem; do
    copy "$1/$2/$file" "$3/$file"
  done
}

copy() {
  if ! cmp -s "$1" "$2"; then
    cp "$1" "$2.new"
    chown --reference="$(dirname "$2")" "$2.new"
    mv "$2.new" "$2"
  fi
}

random() { # bytes, as hex
  od -A n -N "$1" -t x1 /dev/urandom | tr -d ' \n'
}

# data USER VOLUME...: once; later, somebody is writing in it.
data() {
  user=$1
  shift
  for volume; do
    if [ "$(stat -c %u "$volume")" != "$user" ]; then
      chmod 700 "$volume"
      chown -R "$user:$user" "$volume"
    fi
  done
}

# Whom the parts of the cluster believe, and whom etcd believes: no worker has a certificate for etcd.
emberline certs make authority/cluster --ttl 365d --renew-within 120d \
  --coordinator coordinator-1 --coordinator coordinator-2 --coordinator coordinator-3 \
  --workers worker --worker serving:worker --client cli --client prometheus \
  --other s3 --other otel-collector
emberline certs make authority/etcd --ttl 365d --renew-within 120d \
  --other etcd:etcd-1,etcd-2,etcd-3 --client coordinator --client prometheus

token() { # name, role
  emberline tokens generate "$1" --role "$2" --to "authority/$1.token" --hashes authority/tokens
}
token cli admin
token workers worker

if ! [ -e authority/s3-credentials ]; then
  id=$(random 10)
  secret=$(random 20)
  printf 'ROOT_ACCESS_KEY=%s\nROOT_SECRET_KEY=%s\nexport ROOT_ACCESS_KEY ROOT_SECRET_KEY\n' "$id" "$secret" >authority/s3-server.env
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$id" "$secret" >authority/s3-credentials.new
  # The last of the two to come: it says that both are whole.
  mv authority/s3-credentials.new authority/s3-credentials
fi
[ -e secrets-grafana/password ] || random 12 >secrets-grafana/password

certificate authority/etcd etcd secrets-etcd
certificate authority/cluster s3 secrets-s3
# Not there with keys of a bucket that is elsewhere.
[ ! -e authority/s3-server.env ] || copy authority/s3-server.env secrets-s3/server.env
certificate authority/cluster otel-collector secrets-otel-collector
certificate authority/cluster cli secrets-cli
for service in coordinator-1 coordinator-2 coordinator-3 worker serving; do
  certificate authority/cluster "$service" "secrets-$service"
  copy authority/s3-credentials "secrets-$service/s3-credentials"
done
for service in coordinator-1 coordinator-2 coordinator-3; do
  certificate authority/etcd coordinator "secrets-$service/etcd"
  copy authority/tokens "secrets-$service/tokens"
done
for service in worker serving; do
  copy authority/workers.token "secrets-$service/token"
done
copy authority/cli.token secrets-cli/token
certificate authority/cluster prometheus secrets-prometheus
certificate authority/etcd prometheus secrets-prometheus/etcd

# The bucket is a directory of the S3 server.
mkdir -p s3-data/emberline

secrets 65532 etcd s3 coordinator-1 coordinator-2 coordinator-3 worker serving cli
secrets 65534 prometheus
secrets 472 grafana
secrets 10001 otel-collector
data 65532 etcd-1 etcd-2 etcd-3 s3-data serving audit-1 audit-2 audit-3
data 65534 prometheus
data 472 grafana
data 10001 jaeger
