{{- define "fssdeploy.selector" -}}
app.kubernetes.io/name: fssdeploy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "fssdeploy.labels" -}}
{{ include "fssdeploy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
