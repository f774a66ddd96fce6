package witness

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// tracing attaches what needs the kernel's types and CAP_PERFMON. Nothing of it is
// needed for the rest: what fails is said in Hooks, and its methods answer
// errors.ErrUnsupported.
func (w *Witness) tracing(l *layout, noLayout error) {
	const exit, exec, fork, send = "sched_process_exit", "sched_process_exec", "sched_process_fork", "tcp_sendmsg_locked"
	w.noExec, w.noFork, w.noWriter, w.noHolders, w.noHolding = noLayout, noLayout, noLayout, noLayout, noLayout
	if l == nil {
		return
	}
	p := &w.plan
	spec := func(typ ebpf.AttachType, to string, ins asm.Instructions) *ebpf.ProgramSpec {
		return &ebpf.ProgramSpec{Name: "imdsgate", Type: ebpf.Tracing, AttachType: typ, AttachTo: to, Instructions: ins, License: license}
	}
	specs := map[string]*ebpf.ProgramSpec{
		exit:  spec(ebpf.AttachTraceRawTp, exit, p.exit(l)),
		exec:  spec(ebpf.AttachTraceRawTp, exec, p.execve(l)),
		fork:  spec(ebpf.AttachTraceRawTp, fork, p.fork(l)),
		send:  spec(ebpf.AttachTraceRawTp, send, p.write(l)),
		"all": spec(ebpf.AttachTraceIter, "task_file", p.taskFile(l, false)),
		"one": spec(ebpf.AttachTraceIter, "task_file", p.taskFile(l, true)),
	}
	// The package reads the kernel's types anew for each program (25 ms), but once for
	// a collection, which fails as a whole.
	loaded := map[string]*ebpf.Program{}
	if all, err := ebpf.NewCollection(&ebpf.CollectionSpec{Programs: specs}); err == nil {
		loaded = all.Programs
	}
	load := func(name string) (*ebpf.Program, error) {
		if prog := loaded[name]; prog != nil {
			return prog, nil
		}
		prog, err := ebpf.NewProgram(specs[name])
		return prog, privilege(err, unix.CAP_PERFMON, "CAP_PERFMON")
	}
	attach := func(hook, name string) error {
		prog, err := load(name)
		if err == nil {
			var at link.Link
			at, err = link.AttachTracing(link.TracingOptions{Program: prog})
			prog.Close()
			if err == nil {
				w.links = append(w.links, at)
			}
		}
		w.hooks = append(w.hooks, Hook{hook, err == nil, err})
		return err
	}

	if err := attach("tp_btf/"+exit, exit); err != nil {
		// Nobody would remove what the other two store, and they would say it of whoever
		// has the pid next.
		err = fmt.Errorf("without tp_btf/%s: %w", exit, err)
		w.noExec, w.noFork = err, err
		w.hooks = append(w.hooks, Hook{"tp_btf/" + exec, false, err}, Hook{"tp_btf/" + fork, false, err})
		for _, name := range []string{exec, fork} {
			if loaded[name] != nil {
				loaded[name].Close()
			}
		}
	} else {
		w.noExec = attach("tp_btf/"+exec, exec)
		w.noFork = attach("tp_btf/"+fork, fork)
	}
	if w.noWriter = attach("tp_btf/"+send, send); w.noWriter == nil {
		// It compares with what the connect hook read of the process.
		w.noWriter = w.hooks[0].Err
	} else {
		// The tracepoint is of 6.16. The function that it is in has the same first
		// argument, and the socket's lock, too.
		specs[send], loaded[send] = spec(ebpf.AttachTraceFEntry, send, p.write(l)), nil
		w.noWriter = attach("fentry/"+send, send)
	}
	w.noHolders, w.noHolding = w.openIterators(l, load)
	w.hooks = append(w.hooks,
		Hook{"iter/task_file", w.noHolders == nil, w.noHolders},
		Hook{"iter/task_file of one process", w.noHolding == nil, w.noHolding})
}
