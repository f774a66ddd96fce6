package attribution

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	outer = "1f9c4f6a7f5d0f3f37c5a1ac3a0b0c3bd0a1a0f2d4c5e6f708192a3b4c5d6e7f"
	inner = "a09bc17f5aa29b0dbdec9ede5f46cf1396d2405917ab02e6f1eb1019f388396e"
	podID = "1e597579-417e-482f-bf65-5fe170c3aebd"
	slice = "pod1e597579_417e_482f_bf65_5fe170c3aebd.slice"
)

// What cgroup paths look like where they were seen. The directories all belong to
// root, except from the first "!" on.
func TestCgroupOf(t *testing.T) {
	for _, test := range []struct {
		path string
		want Cgroup
	}{
		// Docker.
		{"/docker/" + outer, Cgroup{Container: outer, Runtime: "docker"}},
		{"/system.slice/docker-" + outer + ".scope", Cgroup{Unit: "docker-" + outer + ".scope", Container: outer, Runtime: "docker"}},
		{"/system.slice/docker.service", Cgroup{Unit: "docker.service"}},
		{"/docker/buildkit/t4967jvf8rbufklrhkicskyes", Cgroup{}}, // cryptnono/cryptnono#47
		{"/actions_job/" + outer, Cgroup{Container: outer, Runtime: "docker"}},
		{"/" + outer, Cgroup{Container: outer}}, // neuvector, share/system/cgroup_test.go
		{"/system.slice/docker-!" + outer + ".scope", Cgroup{UserUnit: "docker-" + outer + ".scope"}},

		// ECS on EC2: aws/amazon-ecs-agent#1119, #3127, #4077.
		{"/ecs/bf1ddbfbbc8f45c9b1ac4f779368741e/" + outer, Cgroup{Container: outer, Runtime: "docker"}},
		{"/ecs/48cb34f5-cd39-4d59-9bb9-89f3c1611afd/" + outer, Cgroup{Container: outer, Runtime: "docker"}},
		{"/ecstasks.slice/ecstasks-bf1ddbfbbc8f45c9b1ac4f779368741e.slice/docker-" + outer + ".scope",
			Cgroup{Unit: "docker-" + outer + ".scope", Container: outer, Runtime: "docker"}},

		// Kubernetes with systemd's driver, and a static pod.
		{"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + slice + "/cri-containerd-" + inner + ".scope",
			Cgroup{Unit: "cri-containerd-" + inner + ".scope", Container: inner, Runtime: "containerd", Pod: podID}},
		{"/kubepods.slice/kubepods-" + slice + "/cri-containerd-" + inner + ".scope",
			Cgroup{Unit: "cri-containerd-" + inner + ".scope", Container: inner, Runtime: "containerd", Pod: podID}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + slice + "/crio-" + inner + ".scope",
			Cgroup{Unit: "crio-" + inner + ".scope", Container: inner, Runtime: "cri-o", Pod: podID}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + slice + "/crio-" + inner + ".scope/container",
			Cgroup{Unit: "crio-" + inner + ".scope", Container: inner, Runtime: "cri-o", Pod: podID}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + slice + "/docker-" + inner + ".scope", // kontena/pharos-cluster#440
			Cgroup{Unit: "docker-" + inner + ".scope", Container: inner, Runtime: "docker", Pod: podID}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod89f4f2cb511c3b0b7e5272cff5ec37bf.slice/cri-containerd-" + inner + ".scope",
			Cgroup{Unit: "cri-containerd-" + inner + ".scope", Container: inner, Runtime: "containerd", Pod: "89f4f2cb-511c-3b0b-7e52-72cff5ec37bf"}},
		{"/my-pods.slice/my-pods-kubepods.slice/my-pods-kubepods-" + slice + "/cri-containerd-" + inner + ".scope", // kubelet --cgroup-root
			Cgroup{Unit: "cri-containerd-" + inner + ".scope", Container: inner, Runtime: "containerd", Pod: podID}},
		// The monitor is the host's, whether it is in the pod or not: openshift/machine-config-operator#1296.
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + slice + "/crio-conmon-" + inner + ".scope",
			Cgroup{Unit: "crio-conmon-" + inner + ".scope"}},
		{"/system.slice/crio-conmon-" + inner + ".scope", Cgroup{Unit: "crio-conmon-" + inner + ".scope"}},

		// Kubernetes with cgroupfs.
		{"/kubepods/burstable/pod" + podID + "/" + inner, Cgroup{Container: inner, Pod: podID}},
		{"/kubepods/pod" + podID + "/" + inner, Cgroup{Container: inner, Pod: podID}},
		{"/kubepods/besteffort/pod16a4a44fea21553f3c41d03e478379f0/" + inner, // netdata/netdata#3369
			Cgroup{Container: inner, Pod: "16a4a44f-ea21-553f-3c41-d03e478379f0"}},
		{"/kubepods/burstable/pod" + podID + "/crio-" + inner, Cgroup{Container: inner, Runtime: "cri-o", Pod: podID}}, // cri-o/cri-o#812
		{"/kubepods/burstable/pod" + podID + "/crio-conmon-" + inner, Cgroup{}},
		{"/kubepods/burstable/pod" + podID, Cgroup{Pod: podID}},
		{"/kubepods/burstable/pod" + podID + "!/" + inner, Cgroup{}},
		{"/kubepods/burstable/pod" + podID + "/!" + inner, Cgroup{Pod: podID}},
		{"/pod" + podID + "/" + inner, Cgroup{Container: inner}},
		{"/burstable/pod" + podID, Cgroup{}},
		{"/kubepods/burstable/pod" + strings.ToUpper(podID), Cgroup{}},
		{"/kubepods/burstable/podhdishd83djaidwnduwk28bcsb", Cgroup{}},

		// A runtime that does not use systemd, under a kubelet that does: containerd/containerd#4900.
		{"/system.slice/containerd.service/kubepods-besteffort-" + slice + ":cri-containerd:" + inner,
			Cgroup{Container: inner, Runtime: "containerd", Pod: podID}},
		{"/system.slice/containerd.service", Cgroup{Unit: "containerd.service"}},

		// podman.
		{"/machine.slice/libpod-" + outer + ".scope/container",
			Cgroup{Unit: "libpod-" + outer + ".scope", Container: outer, Runtime: "podman"}},
		{"/machine.slice/libpod-conmon-" + outer + ".scope", Cgroup{Unit: "libpod-conmon-" + outer + ".scope"}},
		{"/machine.slice/machine-libpod_pod_" + inner + ".slice/libpod-" + outer + ".scope",
			Cgroup{Unit: "libpod-" + outer + ".scope", Container: outer, Runtime: "podman"}},
		{"/libpod_parent/libpod-" + outer, Cgroup{Container: outer, Runtime: "podman"}},
		{"/libpod_parent/" + inner + "/libpod-" + outer, Cgroup{Container: outer, Runtime: "podman"}}, // inner is a pod
		{"/libpod_parent/libpod-conmon-" + outer + "/" + outer, Cgroup{}},                             // containers/podman#359
		{"/libpod_parent/conmon", Cgroup{}},
		{"/system.slice/web.service/libpod-payload-" + outer, Cgroup{Unit: "web.service", Container: outer, Runtime: "podman"}},
		{"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + outer + ".scope/container",
			Cgroup{UserUnit: "libpod-" + outer + ".scope"}},

		// containerd without Kubernetes.
		{"/default/" + outer, Cgroup{Container: outer, Runtime: "containerd"}},
		{"/k8s.io/" + outer, Cgroup{Container: outer, Runtime: "containerd"}}, // kubernetes-sigs/cri-tools#1292
		{"/system.slice/nerdctl-" + outer + ".scope", Cgroup{Unit: "nerdctl-" + outer + ".scope", Container: outer, Runtime: "containerd"}},

		// One in another: the outer one counts. kubernetes-sigs/kind#3947, containerd/nri#227, kubernetes/minikube#11280.
		{"/docker/" + outer + "/docker/" + inner, Cgroup{Container: outer, Runtime: "docker"}},
		{"/system.slice/docker-" + outer + ".scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-" +
			slice + "/cri-containerd-" + inner + ".scope",
			Cgroup{Unit: "docker-" + outer + ".scope", Container: outer, Runtime: "docker"}},
		{"/docker/" + outer + "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + slice + "/crio-" + inner + ".scope",
			Cgroup{Container: outer, Runtime: "docker"}},
		{"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-" + slice + "/cri-containerd-" + inner + ".scope",
			Cgroup{Unit: "cri-containerd-" + inner + ".scope", Container: inner, Runtime: "containerd", Pod: podID}},
		{"/kubepods/pod" + podID + "/" + outer + "/docker/" + inner, Cgroup{Container: outer, Pod: podID}},
		{"/docker/" + outer + "/system.slice/nginx.service", Cgroup{Container: outer, Runtime: "docker"}},
		{"/docker/" + outer + "/!system.slice/nginx.service", Cgroup{Container: outer, Runtime: "docker", UserUnit: "nginx.service"}},
		{"/machine.slice/libpod-" + outer + ".scope/container/init.scope",
			Cgroup{Unit: "libpod-" + outer + ".scope", Container: outer, Runtime: "podman"}},
		// Guests without an ID have a root of their own.
		{"/lxc.payload.web/system.slice/docker-" + inner + ".scope", Cgroup{}},
		{"/lxc/web/docker/" + inner, Cgroup{}},
		{"/machine.slice/machine-web.scope/payload/docker/" + inner, Cgroup{Unit: "machine-web.scope"}},
		{"/machine.slice/systemd-nspawn@web.service/payload/kubepods/pod" + podID, Cgroup{Unit: "systemd-nspawn@web.service"}},

		// Names with an instance and escapes stay as they are.
		{`/system.slice/system-openvpn.slice/openvpn@a\x2db.service`, Cgroup{Unit: `openvpn@a\x2db.service`}},
		{`/system.slice/dev-disk-by\x2dlabel-x.swap`, Cgroup{}},
		{"/system.slice/ssh.socket", Cgroup{}},

		// User managers, root's too, and delegated directories.
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/run-u42.service", Cgroup{UserUnit: "run-u42.service"}},
		{"/user.slice/user-1000.slice/user@1000.service/init.scope", Cgroup{UserUnit: "init.scope"}},
		{"/user.slice/user-0.slice/user@0.service/app.slice/docker-" + outer + ".scope", Cgroup{UserUnit: "docker-" + outer + ".scope"}},
		{"/user.slice/user-1000.slice/user@1000.service", Cgroup{UserUnit: "user@1000.service"}},
		{"/user.slice/user-1000.slice/!user@1000.service/app.slice/docker-" + outer + ".scope", Cgroup{UserUnit: "docker-" + outer + ".scope"}},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/docker.service/docker/" + outer, Cgroup{UserUnit: "docker.service"}},
		{"/user.slice/user-1000.slice/session-3.scope", Cgroup{Unit: "session-3.scope"}},
		{"/system.slice/worker.service/!nginx.service", Cgroup{UserUnit: "nginx.service"}},
		{"/system.slice/worker.service/!kubepods/pod" + podID + "/" + outer, Cgroup{Unit: "worker.service"}},
		{"/!system.slice/nginx.service", Cgroup{UserUnit: "nginx.service"}},
		{"/../../system.slice/nginx.service", Cgroup{}},
	} {
		owned := 99
		if before, _, ok := strings.Cut(test.path, "!"); ok {
			owned = strings.Count(before, "/") - 1
		}
		path := strings.Replace(test.path, "!", "", 1)
		test.want.Path = path
		if diff := cmp.Diff(test.want, cgroupOf(path, owned)); diff != "" {
			t.Errorf("%s, %d owned by root (-want +got):\n%s", path, owned, diff)
		}
	}
}

func TestPickHierarchy(t *testing.T) {
	docker := "/docker/" + outer
	controllers := func(path string) string {
		return "12:hugetlb:/\n11:files:/\n10:memory:" + path + "\n9:pids:" + path + "\n8:cpu,cpuacct:" + path + "\n7:devices:" + path + "\n"
	}
	for _, test := range []struct {
		name, file string
		want       hierarchy
		agreed     bool
	}{
		{"cgroup2", "0::/system.slice/ssh.service\n", hierarchy{"", "/system.slice/ssh.service"}, true},
		{"cgroup2 beside an empty one of systemd", "1:name=systemd:/\n0::/system.slice/docker-" + outer + ".scope\n", // elastic/apm-agent-java#1211
			hierarchy{"", "/system.slice/docker-" + outer + ".scope"}, true},
		{"v1 with systemd", controllers("/system.slice/ssh.service") + "1:name=systemd:/system.slice/ssh.service\n",
			hierarchy{"name=systemd", "/system.slice/ssh.service"}, true},
		{"v1 with systemd and Docker", controllers(docker) + "1:name=systemd:" + docker + "\n", hierarchy{"name=systemd", docker}, true},
		{"hybrid", controllers("/") + "1:name=systemd:/system.slice/ssh.service\n0::/system.slice/ssh.service\n",
			hierarchy{"", "/system.slice/ssh.service"}, true},
		{"hybrid, container only in v1", controllers(docker) + "1:name=systemd:" + docker + "\n0::/system.slice/containerd.service\n",
			hierarchy{"name=systemd", docker}, true},
		{"hybrid, in a build of Docker's", controllers("/docker/buildkit/x") + "1:name=systemd:/docker/buildkit/x\n0::/system.slice/docker.service\n",
			hierarchy{"", "/system.slice/docker.service"}, false},
		{"without systemd", controllers(docker), hierarchy{"memory", docker}, true},
		{"without systemd in its hierarchy", controllers(docker) + "1:name=systemd:/\n0::/\n", hierarchy{"memory", docker}, true},
		{"another controller has another container", controllers(docker) + "6:freezer:/docker/" + inner + "\n", hierarchy{"memory", docker}, false},
		{"another controller has none", controllers(docker) + "6:freezer:/\n", hierarchy{"memory", docker}, false},
		{"only memory", "4:memory:/process_api/3d2e9879d18299043e189a3bfafa8ae3\n3:pids:/\n9:name=systemd:/\n0::/\n", hierarchy{"name=systemd", "/"}, true},
		{"one in another", controllers(docker + "/docker/" + inner), hierarchy{"memory", docker + "/docker/" + inner}, true},
		{"nothing", "", hierarchy{}, true},
	} {
		h, agreed := pickHierarchy(parseHierarchies([]byte(test.file)))
		if h != test.want || agreed != test.agreed {
			t.Errorf("%s: %+v, %v, want %+v, %v", test.name, h, agreed, test.want, test.agreed)
		}
	}
}

// Nothing from a directory that does not belong to root ends up in Unit, Container
// and Pod, nor from one below a user manager, nor does a directory below a
// container change what is known.
func FuzzCgroup(f *testing.F) {
	for _, seed := range []string{
		"0::/kubepods.slice/kubepods-" + slice + "/cri-containerd-" + inner + ".scope\n",
		"0::/system.slice/worker.service/nginx.service\n",
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/docker-" + outer + ".scope\n",
		"4:memory:/docker/" + outer + "\n3:pids:/docker/" + outer + "\n1:name=systemd:/\n0::/\n",
		"0::/kubepods/burstable/pod" + podID + "/crio-conmon-" + outer + "/" + outer + "\n",
		"0::/system.slice/containerd.service/kubepods-" + slice + ":cri-containerd:" + inner + "\n",
	} {
		f.Add([]byte(seed), 3, "system.slice/nginx.service")
	}
	f.Fuzz(func(t *testing.T, file []byte, owned int, below string) {
		h, agreed := pickHierarchy(parseHierarchies(file))
		if !agreed && cgroupOf(h.path, 0) != (Cgroup{Path: h.path, UserUnit: cgroupOf(h.path, 0).UserUnit}) {
			t.Fatalf("%+v without a directory of root's", cgroupOf(h.path, 0))
		}
		path := h.path
		c := cgroupOf(path, owned)
		var trusted []string
		for i, dir := range strings.Split(strings.Trim(path, "/"), "/") {
			if i >= owned || strings.HasPrefix(dir, "user@") {
				break
			}
			trusted = append(trusted, dir)
		}
		names := "/" + strings.Join(trusted, "/") + "/"
		if c.Unit != "" && !strings.Contains(names, "/"+c.Unit+"/") {
			t.Errorf("unit %q of %q", c.Unit, names)
		}
		if !strings.Contains(names, c.Container) || len(c.Container) != 0 && !isContainerID(c.Container) || c.Container == "" && c.Runtime != "" {
			t.Errorf("container %q of %q in %q", c.Container, c.Runtime, names)
		}
		digits := strings.NewReplacer("-", "", "_", "")
		if len(c.Pod) != 0 && (len(c.Pod) != 36 || podUID(c.Pod) != c.Pod) || !strings.Contains(digits.Replace(names), digits.Replace(c.Pod)) {
			t.Errorf("pod %q in %q", c.Pod, names)
		}
		if c.Unit != "" && c.UserUnit != "" {
			t.Errorf("%+v", c)
		}
		// What is known does not depend on the names below.
		if at := cgroupOf(names, owned); c.Container != at.Container || c.Pod != at.Pod || c.Unit != "" && c.Unit != at.Unit {
			t.Errorf("%+v, and with what is root's alone %+v", c, at)
		}
		if c.Container != "" {
			d := cgroupOf(strings.TrimSuffix(path, "/")+"/"+below, owned)
			if c.Container != d.Container || c.Pod != d.Pod || d.Unit != "" && c.UserUnit == "" && c.Unit != d.Unit {
				t.Errorf("%+v, and further down %+v", c, d)
			}
		}
	})
}
