// Package kubernetes holds the manifests of the examples to Kubernetes' own types.
package kubernetes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

// manifests are all that the examples have, by kind and name.
type manifests map[string]any

func load(t *testing.T) manifests {
	t.Helper()
	files, err := filepath.Glob("../../examples/kubernetes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no manifests", err)
	}
	all := make(manifests)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range strings.Split(string(text), "\n---\n") {
			kind, name, object := decode(t, file, one)
			if all[kind+" "+name] != nil {
				t.Errorf("%s: %s %s is there twice", file, kind, name)
			}
			all[kind+" "+name] = object
		}
	}
	return all
}

// decode refuses what the kind has no field for.
func decode(t *testing.T, file, text string) (kind, name string, object any) {
	t.Helper()
	var head struct {
		APIVersion string
		Kind       string
		Metadata   struct{ Name string }
	}
	if err := yaml.Unmarshal([]byte(text), &head); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	switch head.APIVersion + " " + head.Kind {
	case "v1 ConfigMap":
		object = new(corev1.ConfigMap)
	case "v1 Service":
		object = new(corev1.Service)
	case "apps/v1 Deployment":
		object = new(appsv1.Deployment)
	case "policy/v1 PodDisruptionBudget":
		object = new(policyv1.PodDisruptionBudget)
	default:
		t.Fatalf("%s: no such kind here: %s %s", file, head.APIVersion, head.Kind)
	}
	if err := yaml.UnmarshalStrict([]byte(text), object); err != nil {
		t.Errorf("%s: %s %s: %v", file, head.Kind, head.Metadata.Name, err)
	}
	return head.Kind, head.Metadata.Name, object
}

func get[T any](t *testing.T, all manifests, key string) T {
	t.Helper()
	object, ok := all[key].(T)
	if !ok {
		t.Fatalf("no %s", key)
	}
	return object
}

// What is named in one place has to be there in the other.
func TestManifestsBelongTogether(t *testing.T) {
	all := load(t)
	pod := get[*appsv1.Deployment](t, all, "Deployment tcp-lb").Spec.Template
	service := get[*corev1.Service](t, all, "Service tcp-lb")
	budget := get[*policyv1.PodDisruptionBudget](t, all, "PodDisruptionBudget tcp-lb")
	for what, selector := range map[string]map[string]string{
		"Deployment":          get[*appsv1.Deployment](t, all, "Deployment tcp-lb").Spec.Selector.MatchLabels,
		"Service":             service.Spec.Selector,
		"PodDisruptionBudget": budget.Spec.Selector.MatchLabels,
		"spread":              pod.Spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels,
	} {
		if len(selector) == 0 || !labels.SelectorFromSet(selector).Matches(labels.Set(pod.Labels)) {
			t.Errorf("%s: %v does not select the pods, which are %v", what, selector, pod.Labels)
		}
	}
	caddy := pod.Spec.Containers[0]
	ports := make(map[string]int32)
	for _, p := range caddy.Ports {
		ports[p.Name] = p.ContainerPort
	}
	for what, name := range map[string]string{
		"Service":   service.Spec.Ports[0].TargetPort.StrVal,
		"readiness": caddy.ReadinessProbe.HTTPGet.Port.StrVal,
		"liveness":  caddy.LivenessProbe.HTTPGet.Port.StrVal,
	} {
		if ports[name] == 0 {
			t.Errorf("%s: the container has no port %q", what, name)
		}
	}
	volumes := make(map[string]corev1.Volume)
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = v
	}
	for _, m := range caddy.VolumeMounts {
		if _, ok := volumes[m.Name]; !ok || m.SubPath != "" {
			t.Errorf("mount %s of %q: want a volume, as a whole", m.MountPath, m.Name)
		}
	}
	delay := 10 // the Caddyfile's shutdown_delay, in seconds
	if r := caddy.ReadinessProbe; int(r.PeriodSeconds*r.FailureThreshold) <= delay+int(r.PeriodSeconds) {
		t.Errorf("a pod that ends stops being ready before shutdown_delay is over, and its node drops its clients")
	}
	config := get[*corev1.ConfigMap](t, all, "ConfigMap "+volumes["config"].ConfigMap.Name).Data["Caddyfile"]
	for _, want := range []string{
		fmt.Sprintf("shutdown_delay %ds", delay), "tcp_lb/:5432", "http://:9090", "tcp_lb_health " + caddy.ReadinessProbe.HTTPGet.Path, "respond " + caddy.LivenessProbe.HTTPGet.Path,
		"dynamic a " + get[*corev1.Service](t, all, "Service db-pods").Name + " 5432",
	} {
		if !strings.Contains(config, want) {
			t.Errorf("the Caddyfile has no %q", want)
		}
	}
}
