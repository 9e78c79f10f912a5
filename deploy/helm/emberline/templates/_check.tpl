{{/* What cannot be meant is refused here, each with one line that names the value. */}}
{{- define "emberline.check" -}}
{{- $v := .Values -}}
{{- if not $v.image.repository }}{{ fail "set image.repository: where the image of deploy/Dockerfile is, e.g. registry.example.org/emberline" }}{{ end -}}
{{- if and $v.gpuWorkers.enabled (not $v.gpuWorkers.image.repository) }}{{ fail "set gpuWorkers.image.repository: where the target `gpu` of deploy/Dockerfile is; the image of the others has no driver" }}{{ end -}}
{{- range $name, $image := dict "image" $v.image "workers.image" $v.workers.image "gpuWorkers.image" $v.gpuWorkers.image "serving.image" $v.serving.image -}}
  {{- if eq $image.tag "latest" }}{{ fail (printf "%s.tag: `latest` names no version, and an upgrade could not be told from a restart" $name) }}{{ end -}}
{{- end -}}
{{- if not $v.etcd.endpoints }}{{ fail "set etcd.endpoints: the members of an etcd that is there already, e.g. {https://etcd-0.etcd.data.svc:2379}" }}{{ end -}}
{{- if not $v.artifacts.url }}{{ fail "set artifacts.url: the bucket for artifacts, e.g. s3://my-bucket/emberline" }}{{ end -}}

{{- $cm := $v.tls.certManager -}}
{{- $named := compact (list $v.tls.coordinatorSecret $v.tls.workerSecret $v.tls.servingSecret $v.tls.clientSecret) -}}
{{- $tokens := compact (list $v.auth.tokensSecret.name $v.auth.workerTokenSecret.name $v.auth.clientTokenSecret.name) -}}
{{- if $v.insecure -}}
  {{- if or $cm.enabled $named }}{{ fail "insecure: it excludes `tls`: leave one of the two out" }}{{ end -}}
  {{- if $tokens }}{{ fail "insecure: it excludes `auth`: leave one of the two out" }}{{ end -}}
{{- else -}}
  {{- if and $cm.enabled $named }}{{ fail "tls: `certManager.enabled` makes the Secrets itself: name none of your own beside it" }}{{ end -}}
  {{- if not (or $cm.enabled $named) }}{{ fail "tls: set tls.coordinatorSecret and tls.workerSecret, or tls.certManager.enabled; or set insecure=true to let whoever reaches a port run commands on the workers" }}{{ end -}}
  {{- if and $cm.enabled (not $cm.issuer.name) }}{{ fail "set tls.certManager.issuer.name: who signs the certificates" }}{{ end -}}
  {{- if not $cm.enabled -}}
    {{- if not $v.tls.coordinatorSecret }}{{ fail "set tls.coordinatorSecret: TLS is configured by half" }}{{ end -}}
    {{- if not $v.tls.workerSecret }}{{ fail "set tls.workerSecret: TLS is configured by half" }}{{ end -}}
    {{- if and $v.serving.enabled (not $v.tls.servingSecret) }}{{ fail "set tls.servingSecret: serving.enabled needs a certificate, and TLS is configured by half" }}{{ end -}}
    {{- if and $v.monitoring.monitors.enabled (not (or $v.monitoring.tlsSecret $v.tls.clientSecret)) }}{{ fail "set monitoring.tlsSecret (or tls.clientSecret): Prometheus needs a client certificate to read metrics" }}{{ end -}}
    {{- if and $v.auth.clientTokenSecret.name (not $v.tls.clientSecret) }}{{ fail "set tls.clientSecret: auth.clientTokenSecret is of no use without a client certificate" }}{{ end -}}
  {{- end -}}
  {{- if not $v.auth.tokensSecret.name }}{{ fail "set auth.tokensSecret.name: the Secret with the hashes of the tokens that are valid from the start" }}{{ end -}}
  {{- if not $v.auth.workerTokenSecret.name }}{{ fail "set auth.workerTokenSecret.name: the Secret with the workers' join token" }}{{ end -}}
  {{- range $v.etcd.endpoints -}}
    {{- if not (hasPrefix "https://" .) }}{{ fail (printf "etcd.endpoints: `%s` is not https: whoever reaches it could rewrite the cluster's state" .) }}{{ end -}}
  {{- end -}}
{{- end -}}
{{- if and $v.etcd.user (not $v.etcd.passwordSecret.name) }}{{ fail "set etcd.passwordSecret.name: etcd.user has no password" }}{{ end -}}
{{- if and $v.etcd.passwordSecret.name (not $v.etcd.user) }}{{ fail "set etcd.user: etcd.passwordSecret is nobody's" }}{{ end -}}

{{- range $name := list "workers" "gpuWorkers" "serving" -}}
  {{- $pool := get $v $name -}}
  {{- if le (int (include "emberline.mebibytes" $pool.memoryLimit)) (int (include "emberline.mebibytes" $pool.memory)) }}{{ fail (printf "%s.memoryLimit: `%s` must be more than %s.memory (`%s`): the worker itself needs some" $name $pool.memoryLimit $name $pool.memory) }}{{ end -}}
  {{- if le (int (include "emberline.mebibytes" $pool.state.size)) (int (include "emberline.mebibytes" $pool.cacheSize)) }}{{ fail (printf "%s.state.size: `%s` must be more than %s.cacheSize (`%s`): stages work there, too" $name $pool.state.size $name $pool.cacheSize) }}{{ end -}}
{{- end -}}
{{- $scaling := $v.workers.autoscaling -}}
{{- if ne $scaling.type "none" -}}
  {{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}{{ fail (printf "workers.autoscaling.minReplicas: %d is more than maxReplicas (%d)" (int $scaling.minReplicas) (int $scaling.maxReplicas)) }}{{ end -}}
  {{- if and (eq $scaling.type "keda") (not $scaling.keda.serverAddress) }}{{ fail "set workers.autoscaling.keda.serverAddress: the Prometheus that KEDA asks, e.g. http://prometheus.monitoring.svc:9090" }}{{ end -}}
  {{- if and (eq $scaling.type "hpa") (lt (int $scaling.minReplicas) 1) }}{{ fail "workers.autoscaling.minReplicas: 0 takes `type: keda`; an HPA keeps one worker at least" }}{{ end -}}
{{- end -}}
{{- end -}}
