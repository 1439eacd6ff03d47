{{- define "polyclinic.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "polyclinic.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "polyclinic.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "polyclinic.container" -}}
image: {{ include "polyclinic.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
env:
  - name: TZ
    value: {{ .Values.timezone | quote }}
  - name: OMP_NUM_THREADS
    value: {{ .Values.threads | quote }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  - name: home
    mountPath: /var/lib/polyclinic
  - name: tmp
    mountPath: /tmp
{{- end }}
