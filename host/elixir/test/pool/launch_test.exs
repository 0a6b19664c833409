defmodule Bridge.Kernel.LaunchTest do
  use ExUnit.Case, async: true

  alias Bridge.Kernel.Launch

  # Imported by every Python at its start: this kernel has a child, which outlives it unless somebody sees to it.
  @with_a_child """
  import os, subprocess
  child = subprocess.Popen(["sleep", "600"])
  with open(os.environ["CHILDREN"], "w") as file:
      file.write(str(child.pid))
  """

  setup do
    dir = Path.join(System.tmp_dir!(), "bridge-launch-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(Path.join(dir, "python"))
    File.chmod!(dir, 0o700)
    File.write!(Path.join([dir, "python", "sitecustomize.py"]), @with_a_child)
    on_exit(fn -> File.rm_rf!(dir) end)
    {:ok, dir: dir, cfg: config(dir)}
  end

  defp config(dir) do
    %{
      python: Bridge.TestKernels.python(),
      runtime_dir: dir,
      arguments: [],
      env: fn -> env(dir) end
    }
  end

  defp env(dir), do: %{"PYTHONPATH" => Path.join(dir, "python"), "CHILDREN" => Path.join(dir, "children")}

  defp started(cfg) do
    {:ok, launched} = Launch.start(cfg, 1)
    on_exit(fn -> Launch.close(launched) end)
    assert :ok = Launch.await(launched, 30_000)
    launched
  end

  defp child(dir), do: dir |> Path.join("children") |> File.read!() |> String.to_integer()

  defp alive?(pid) do
    case File.read("/proc/#{pid}/stat") do
      {:ok, line} -> (line |> String.split(")") |> List.last() |> String.split() |> hd()) not in ["Z", "X"]
      {:error, _} -> false
    end
  end

  defp assert_ends(pids, left \\ 6_000) do
    cond do
      not Enum.any?(pids, &alive?/1) -> :ok
      left == 0 -> flunk("still there: #{inspect(Enum.filter(pids, &alive?/1))}")
      true -> Process.sleep(10) && assert_ends(pids, left - 1)
    end
  end

  defp assert_removed(dir, left \\ 6_000) do
    cond do
      not File.exists?(dir) -> :ok
      left == 0 -> flunk("#{dir} is still there")
      true -> Process.sleep(10) && assert_removed(dir, left - 1)
    end
  end

  # Run by a process of its own, which is the kernel's owner; it stays until it is told or killed.
  defp owned_elsewhere(cfg) do
    test = self()

    owner =
      spawn(fn ->
        {:ok, launched} = Launch.start(cfg, 1)
        send(test, {:launched, self(), launched, Launch.await(launched, 30_000)})
        receive do: (:end -> :ok)
      end)

    assert_receive {:launched, ^owner, launched, :ok}, 60_000
    on_exit(fn -> Launch.close(launched) end)
    {owner, launched}
  end

  test "a kernel listens on the sockets that its connection says, in a directory that is nobody else's", %{cfg: cfg} do
    launched = started(cfg)
    assert alive?(launched.os_pid)
    assert Bitwise.band(File.stat!(launched.dir).mode, 0o777) == 0o700
    assert Bitwise.band(File.stat!(launched.connection.file).mode, 0o777) == 0o600
    assert byte_size(launched.connection.key) == 64

    for channel <- [:shell, :control, :iopub, :stdin, :hb] do
      assert {:ipc, path} = launched.connection[channel]
      assert {:ok, socket} = :gen_tcp.connect({:local, path}, 0, [])
      :gen_tcp.close(socket)
    end
  end

  test "neither its key nor its environment shows when it is inspected", %{cfg: cfg} do
    launched = started(cfg)
    refute inspect(launched, limit: :infinity) =~ launched.connection.key
  end

  test "a kernel and all that it started end at once when it is killed, and its owner hears it", %{cfg: cfg, dir: dir} do
    %{port: port} = launched = started(cfg)
    pids = [launched.os_pid, child(dir)]
    assert Enum.all?(pids, &alive?/1)
    assert :ok = Launch.kill(launched)
    assert_receive {^port, {:exit_status, 137}}, 60_000
    assert_ends(pids)
    assert :ok = Launch.kill(launched)
  end

  test "a kernel that dies by itself is heard of at once, although what it started lives on", %{cfg: cfg, dir: dir} do
    %{port: port} = launched = started(cfg)
    System.cmd("kill", ["-9", to_string(launched.os_pid)])
    assert_receive {^port, {:exit_status, 137}}, 60_000
    assert alive?(child(dir))
    assert :ok = Launch.close(launched)
    assert_ends([child(dir)])
  end

  test "closing leaves no process and no file, twice as well as once", %{cfg: cfg, dir: dir} do
    launched = started(cfg)
    guard = Process.monitor(launched.guard)
    assert :ok = Launch.close(launched)
    assert_receive {:DOWN, ^guard, :process, _, _}, 60_000
    refute File.exists?(launched.dir)
    assert_ends([launched.os_pid, child(dir)])
    assert :ok = Launch.close(launched)
  end

  test "a process that was given the pid of a dead kernel is left alone", %{cfg: cfg} do
    launched = started(cfg)
    stranger = Port.open({:spawn_executable, System.find_executable("sleep")}, [:binary, args: ["600"]])
    {:os_pid, pid} = Port.info(stranger, :os_pid)
    assert :ok = Launch.kill(%{launched | os_pid: pid})
    assert alive?(pid)
    System.cmd("kill", ["-9", to_string(pid)])
  end

  test "a kernel ends with all that it started when its owner is killed", %{cfg: cfg, dir: dir} do
    {owner, launched} = owned_elsewhere(cfg)
    pids = [launched.os_pid, child(dir)]
    Process.exit(owner, :kill)
    assert_ends(pids)
    assert_removed(launched.dir)
  end

  test "so does one whose owner ends as if all were well", %{cfg: cfg, dir: dir} do
    {owner, launched} = owned_elsewhere(cfg)
    send(owner, :end)
    assert_ends([launched.os_pid, child(dir)])
    assert_removed(launched.dir)
  end

  test "a kernel that cannot notice, for it is stopped, ends with its owner too", %{cfg: cfg, dir: dir} do
    {owner, launched} = owned_elsewhere(cfg)
    {_, 0} = System.cmd("kill", ["-STOP", to_string(launched.os_pid)])
    Process.exit(owner, :kill)
    assert_ends([launched.os_pid, child(dir)])
  end

  test "the lifeline alone is enough: without the guard a kernel ends with its owner's port", %{cfg: cfg, dir: dir} do
    launched = started(cfg)
    Process.exit(launched.guard, :kill)
    Port.close(launched.port)
    assert_ends([launched.os_pid, child(dir)])
  end

  @script """
  {%{env: env} = cfg, []} = Code.eval_string(System.fetch_env!("CONFIG"))
  cfg = %{cfg | env: fn -> env end}
  {:ok, launched} = Bridge.Kernel.Launch.start(cfg, 1)
  :ok = Bridge.Kernel.Launch.await(launched, 30_000)
  IO.puts("started " <> System.pid() <> " " <> Integer.to_string(launched.os_pid))
  Process.sleep(:infinity)
  """

  for {how, arguments} <- ["is SIGKILLed": ["-9"], "is told to end": ["-TERM"]] do
    test "no kernel and nothing that it started is left when the BEAM #{how}", %{cfg: cfg, dir: dir} do
      ebin = Bridge.Error |> :code.which() |> Path.dirname()

      beam =
        Port.open({:spawn_executable, System.find_executable("elixir")}, [
          :binary,
          :stderr_to_stdout,
          line: 1_000,
          args: ["-pa", ebin, "-e", @script],
          env: [{~c"CONFIG", %{cfg | env: env(dir)} |> inspect(limit: :infinity) |> to_charlist()}]
        ])

      assert_receive {^beam, {:data, {:eol, "started " <> pids}}}, 60_000
      [beam_pid, kernel] = pids |> String.split() |> Enum.map(&String.to_integer/1)
      pids = [kernel, child(dir)]
      assert Enum.all?(pids, &alive?/1)
      {_, 0} = System.cmd("kill", unquote(arguments) ++ [to_string(beam_pid)])
      assert_ends([beam_pid | pids])
    end
  end

  test "a program that is not there is an error that says how to go on", %{cfg: cfg, dir: dir} do
    assert {:error, %Bridge.Error{name: :kernel_start_failed} = error} = Launch.start(%{cfg | python: "no-python"}, 1)
    assert error.message =~ "no-python"
    assert error.remedy =~ "python:"
    assert File.ls!(dir) == ["python"]
  end

  test "a kernel that ends before it is ready says so with its last words, and leaves its exit to the owner", context do
    %{cfg: cfg} = context
    {:ok, %{port: port} = launched} = Launch.start(%{cfg | arguments: ["--Policy.no_such_thing=1", "--nothing"]}, 1)
    on_exit(fn -> Launch.close(launched) end)
    assert {:error, %Bridge.Error{name: :kernel_start_failed} = error} = Launch.await(launched, 30_000)
    assert error.message =~ "exit code"
    assert error.message =~ "--nothing"
    assert_received {^port, {:exit_status, _}}
  end

  test "a Python without the kernel's package is told where to install it", %{cfg: cfg, dir: dir} do
    python = Path.join(dir, "other-python")
    File.write!(python, "#!/bin/sh\necho \"$0: No module named bridge_kernel\" >&2; exit 1\n")
    File.chmod!(python, 0o700)
    {:ok, launched} = Launch.start(%{cfg | python: python}, 1)
    on_exit(fn -> Launch.close(launched) end)
    assert {:error, error} = Launch.await(launched, 30_000)
    assert error.remedy =~ "pip install /"
  end

  test "a kernel that never gets ready is given up in time", %{cfg: cfg, dir: dir} do
    python = Path.join(dir, "slow-python")
    File.write!(python, "#!/bin/sh\nexec sleep 600\n")
    File.chmod!(python, 0o700)
    {:ok, launched} = Launch.start(%{cfg | python: python}, 1)
    assert {:error, %Bridge.Error{name: :kernel_start_failed} = error} = Launch.await(launched, 50)
    assert error.message =~ "50 ms"
    assert :ok = Launch.close(launched)
    assert_ends([launched.os_pid])
  end

  test "a directory that is too deep for sockets is refused before anything is started", %{cfg: cfg, dir: dir} do
    deep = Path.join(dir, String.duplicate("d", 100))
    assert {:error, %Bridge.Error{name: :kernel_start_failed} = error} = Launch.start(%{cfg | runtime_dir: deep}, 1)
    assert error.remedy =~ "TMPDIR"
  end

  test "what a kernel prints is kept to its end, however much it is", %{cfg: cfg, dir: dir} do
    python = Path.join(dir, "chatty-python")
    File.write!(python, "#!/bin/sh\nyes 'chatter é' | head -c 5000000; printf '\\377 last words'; exec sleep 600\n")
    File.chmod!(python, 0o700)
    {:ok, launched} = Launch.start(%{cfg | python: python}, 1)
    on_exit(fn -> Launch.close(launched) end)
    log = Path.join(launched.dir, "kernel.log")
    assert_eventually(fn -> Launch.log_tail(launched) =~ "last words" end)
    assert String.valid?(Launch.log_tail(launched))
    assert byte_size(Launch.log_tail(launched)) < 5_000
    assert :ok = Launch.trim_log(launched)
    assert File.stat!(log).size < 5_000
    assert Launch.log_tail(launched) =~ "last words"
    refute_received {_, {:data, _}}
  end

  defp assert_eventually(condition, left \\ 6_000) do
    cond do
      condition.() -> :ok
      left == 0 -> flunk("not within a minute")
      true -> Process.sleep(10) && assert_eventually(condition, left - 1)
    end
  end
end
