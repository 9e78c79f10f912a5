{{/* The pod template of workers: {root, values, component, part, account, claims}. With `claims` the state
     directory is a claim of the StatefulSet. */}}
{{- define "emberline.workerPod" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $serves := eq .component "serving" -}}
{{- $name := printf "%s-%s" (include "emberline.fullname" $root) .component -}}
metadata:
  # No versions among them: a new chart with the same pods restarts nothing.
  labels:
    {{- include "emberline.selector" . | nindent 4 }}
  annotations:
    kubectl.kubernetes.io/default-container: worker
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "emberline.podSettings" . | nindent 2 }}
  {{- with include "emberline.placement" $values }}{{ . | nindent 2 }}{{ end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- include "emberline.apart" (merge (dict "affinity" $values.affinity) .) | nindent 2 }}
  # `drainTimeout`, and a minute to checkpoint, to store and to hand over.
  terminationGracePeriodSeconds: {{ add (include "emberline.seconds" $values.drainTimeout) 60 }}
  containers:
    - name: worker
      image: {{ include "emberline.image" (dict "root" $root "image" $values.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - worker
        - --cpu={{ $values.cpu }}
        - --memory={{ $values.memory }}B
        - --gpus={{ default 0 $values.gpus }}
        - --slots={{ $values.slots }}
        - --drain-timeout={{ $values.drainTimeout }}
        {{- range $key, $value := $values.labels }}
        - {{ printf "--label=%s=%s" $key $value | quote }}
        {{- end }}
        {{- if $root.Values.insecure }}
        - --insecure
        {{- end }}
        {{- range $values.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - name: EMBERLINE_NAME
          valueFrom:
            fieldRef: { fieldPath: metadata.name }
        - name: EMBERLINE_SERVER
          value: {{ include "emberline.server" $root }}
        - name: EMBERLINE_STATE_DIR
          value: /var/lib/emberline
        - name: EMBERLINE_CACHE_SIZE
          value: {{ $values.cacheSize }}B
        - name: EMBERLINE_METRICS_LISTEN
          value: 0.0.0.0:7421
        {{- if $serves }}
        - name: EMBERLINE_SERVE
          value: 0.0.0.0:7430
        - name: EMBERLINE_SERVE_ADVERTISE
          value: $(EMBERLINE_NAME).{{ $name }}-pods.{{ $root.Release.Namespace }}.svc:7430
        - name: EMBERLINE_ENVIRONMENT
          value: {{ $values.environment }}
        {{- end }}
        {{- with $root.Values.auth.workerTokenSecret.name }}
        - name: EMBERLINE_TOKEN_FILE
          value: /etc/emberline/token/token
        {{- end }}
        {{- with include "emberline.objectStoreEnv" $root }}{{ . | nindent 8 }}{{ end }}
        {{- include "emberline.env" . | nindent 8 }}
      ports:
        - { name: metrics, containerPort: 7421 }
        {{- if $serves }}
        - { name: inference, containerPort: 7430 }
        {{- end }}
      {{- if $serves }}
      # Not whether it has a leader: it answers without one.
      readinessProbe:
        {{- if $root.Values.insecure }}
        httpGet: { path: /v2/health/ready, port: inference }
        {{- else }}
        # Kubernetes cannot show the client certificate that `/v2/health/ready` asks for.
        tcpSocket: { port: inference }
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 5
      {{- else }}
      # Ready is who has a session with a leader. There is no liveness probe: a worker computes on while
      # nobody leads, and one that hangs is found lost by the leader.
      readinessProbe:
        exec:
          command: [/usr/bin/emberline, health, worker, "localhost:7421"]
        periodSeconds: 10
        timeoutSeconds: 5
      {{- end }}
      resources:
        requests:
          cpu: {{ $values.cpu }}
          memory: {{ $values.memoryLimit }}
          {{- if not $values.state.persistentVolume }}
          ephemeral-storage: {{ $values.state.size }}
          {{- end }}
        limits:
          memory: {{ $values.memoryLimit }}
          {{- with $values.gpus }}
          {{ $values.gpuResource }}: {{ . }}
          {{- end }}
      securityContext:
        {{- include "emberline.securityContext" $root | nindent 8 }}
      volumeMounts:
        - { name: state, mountPath: /var/lib/emberline }
        {{- include "emberline.volumeMounts" . | nindent 8 }}
        {{- if $root.Values.auth.workerTokenSecret.name }}
        - { name: token, mountPath: /etc/emberline/token, readOnly: true }
        {{- end }}
  volumes:
    {{- if not $values.state.persistentVolume }}
    - name: state
      emptyDir: { sizeLimit: {{ $values.state.size }} }
    {{- else if not .claims }}
    - name: state
      ephemeral:
        volumeClaimTemplate:
          spec:
            {{- include "emberline.claim" $values.state | nindent 12 }}
    {{- end }}
    {{- include "emberline.volumes" . | nindent 4 }}
    {{- if $root.Values.auth.workerTokenSecret.name }}
    {{- include "emberline.fileVolume" (dict "name" "token" "secret" $root.Values.auth.workerTokenSecret) | nindent 4 }}
    {{- end }}
{{- end -}}
