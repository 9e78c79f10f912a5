{{- define "emberline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What pods are selected by: {root, component}. */}}
{{- define "emberline.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "emberline.labels" -}}
{{ include "emberline.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: emberline
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image of a part: {root, image}; image is the part's own, or nothing. */}}
{{- define "emberline.image" -}}
{{- $image := .root.Values.image -}}
{{- if (default dict .image).repository }}{{ $image = .image }}{{ end -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* `true` where every port speaks TLS. */}}
{{- define "emberline.secured" -}}
{{- if not .Values.insecure -}}true{{- end -}}
{{- end -}}

{{/* The Secret with the certificate of a part: {root, part}; part is coordinator, worker, serving or client. */}}
{{- define "emberline.tlsSecret" -}}
{{- if .root.Values.tls.certManager.enabled -}}
{{ include "emberline.fullname" .root }}-{{ .part }}-tls
{{- else -}}
{{ get .root.Values.tls (printf "%sSecret" .part) }}
{{- end -}}
{{- end -}}

{{/* The stable names of the coordinators, for `--server`. */}}
{{- define "emberline.server" -}}
{{- $name := include "emberline.fullname" . -}}
{{- $all := list -}}
{{- range $i := until (int .Values.coordinators.replicas) -}}
{{- $all = append $all (printf "%s-coordinator-%d.%s-coordinator-pods.%s.svc:7420" $name $i $name $.Release.Namespace) -}}
{{- end -}}
{{ join "," $all }}
{{- end -}}

{{/* A duration such as `90s`, `10m`, `1h30m` in seconds. */}}
{{- define "emberline.seconds" -}}
{{- $sum := 0 -}}
{{- range regexFindAll "[0-9]+[smh]" . -1 -}}
{{- $factor := get (dict "s" 1 "m" 60 "h" 3600) (substr (int (sub (len .) 1)) (len .) .) -}}
{{- $sum = add $sum (mul $factor (int64 (regexFind "[0-9]+" .))) -}}
{{- end -}}
{{ $sum }}
{{- end -}}

{{/* A size such as `512Mi` or `4Gi` in MiB. */}}
{{- define "emberline.mebibytes" -}}
{{- $factor := get (dict "Mi" 1 "Gi" 1024 "Ti" 1048576) (regexFind "[MGT]i$" .) -}}
{{ mul $factor (int64 (regexFind "^[0-9]+" .)) }}
{{- end -}}

{{/* The port of an URL. */}}
{{- define "emberline.port" -}}
{{- $url := urlParse . -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) (regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host)) -}}
{{- end -}}

{{/* What every pod has: {root, component}. */}}
{{- define "emberline.podSettings" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ include "emberline.fullname" .root }}-{{ .account }}
automountServiceAccountToken: false
# Else a Service called `emberline` would set EMBERLINE_… variables.
enableServiceLinks: false
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- toYaml $values.podSecurityContext | nindent 2 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{/* Where pods go: the values of a component. */}}
{{- define "emberline.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Keeps pods of a component apart where that can be: {root, component, affinity}. */}}
{{- define "emberline.apart" -}}
{{- if .affinity -}}
affinity:
  {{- toYaml .affinity | nindent 2 }}
{{- else -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "emberline.selector" . | nindent 14 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "emberline.selector" . | nindent 8 }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: {{ default "ScheduleAnyway" .spread }}
    labelSelector:
      matchLabels:
        {{- include "emberline.selector" . | nindent 8 }}
{{- end -}}

{{- define "emberline.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/* The environment for TLS, the log, and what the user adds: {root, part}. */}}
{{- define "emberline.env" -}}
- name: EMBERLINE_LOG_FORMAT
  value: {{ .root.Values.logFormat }}
{{- if include "emberline.secured" .root }}
- name: EMBERLINE_TLS_CA
  value: /etc/emberline/tls/ca.crt
- name: EMBERLINE_TLS_CERT
  value: /etc/emberline/tls/tls.crt
- name: EMBERLINE_TLS_KEY
  value: /etc/emberline/tls/tls.key
{{- end }}
{{- with .root.Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The environment for the object store. */}}
{{- define "emberline.objectStoreEnv" -}}
{{- $store := .Values.artifacts -}}
{{- with $store.endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- with $store.region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- with $store.credentialsSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef: { name: {{ $store.credentialsSecret }}, key: {{ . }} }
{{- end }}
{{- end }}
{{- if $store.caSecret.name }}
- name: AWS_CA_BUNDLE
  value: /etc/emberline/object-store/{{ $store.caSecret.key }}
{{- end }}
{{- end -}}

{{/* Secrets are mounted as directories, never by subPath: so renewed files arrive. {root, part} */}}
{{- define "emberline.volumeMounts" -}}
- { name: tmp, mountPath: /tmp }
{{- if include "emberline.secured" .root }}
- { name: tls, mountPath: /etc/emberline/tls, readOnly: true }
{{- end }}
{{- if and .root.Values.artifacts.caSecret.name (ne .part "client") }}
- { name: object-store, mountPath: /etc/emberline/object-store, readOnly: true }
{{- end }}
{{- with .root.Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "emberline.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if include "emberline.secured" .root }}
- name: tls
  secret:
    secretName: {{ include "emberline.tlsSecret" . }}
    defaultMode: 0440
{{- end }}
{{- if and .root.Values.artifacts.caSecret.name (ne .part "client") }}
- name: object-store
  secret:
    secretName: {{ .root.Values.artifacts.caSecret.name }}
    defaultMode: 0440
{{- end }}
{{- with .root.Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A volume of a Secret that is one file, and its mount: {name, secret}. */}}
{{- define "emberline.fileVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret.name }}
    defaultMode: 0440
    items:
      - { key: {{ .secret.key }}, path: {{ .name }} }
{{- end -}}

{{/* A claim of a ReadWriteOnce volume: {size, storageClassName}. */}}
{{- define "emberline.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: { storage: {{ .size }} }
{{- end -}}
