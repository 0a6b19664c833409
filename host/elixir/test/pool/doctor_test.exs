defmodule Bridge.DoctorTest do
  use ExUnit.Case, async: true

  alias Bridge.Doctor

  setup do
    dir = Path.join(System.tmp_dir!(), "bridge-doctor-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(dir)
    on_exit(fn -> File.rm_rf!(dir) end)
    {:ok, dir: dir}
  end

  defp program(dir, text) do
    path = Path.join(dir, "python")
    File.write!(path, "#!/bin/sh\n" <> text)
    File.chmod!(path, 0o700)
    path
  end

  defp check(doctor, name), do: Enum.find(doctor.checks, &(&1.name == name))

  # A Python that answers as the doctor's question wants it, whatever it was.
  defp answering(dir, json), do: program(dir, "cat <<'END'\n#{json}\nEND\n")

  test "where everything is there it says so, with versions and places" do
    doctor = Doctor.run(python: Bridge.TestKernels.python())
    assert doctor.ready
    assert check(doctor, "Elixir").found == System.version()
    assert check(doctor, "OTP").found == System.otp_release()
    assert check(doctor, "JSON").found == inspect(elem(Bridge.JSON.backend(), 1))
    assert %{status: :ok, found: "3." <> _, note: "/" <> _} = check(doctor, "Python")
    assert %{status: :ok, note: "protocol 1.0"} = check(doctor, "bridge_kernel")
    assert inspect(doctor) =~ ~r/\A#Bridge.Doctor<ready\n/
    assert inspect(doctor) =~ ~r/ok +bridge_kernel +\d/
  end

  test "what is optional and absent does not keep it from being ready, and says what is lost and how to get it" do
    doctor = Doctor.run(python: Bridge.TestKernels.python())

    for name <- [":telemetry", "Kino", "Nx", "Decimal"], check = check(doctor, name), check.status == :absent do
      assert check.note =~ "without it"
      assert check.remedy =~ "Mix.install"
      assert inspect(doctor) =~ check.remedy
    end

    assert doctor.ready
  end

  test "without a Python it is not ready, and says what to do" do
    doctor = Doctor.run(python: "/no/such/python")
    refute doctor.ready
    assert %{status: :missing, remedy: remedy} = check(doctor, "Python")
    assert remedy =~ "python:"
    assert check(doctor, "bridge_kernel").status == :missing
    assert inspect(doctor) =~ "not ready"
    assert inspect(doctor) =~ "MISSING"
  end

  test "a Python without the kernel's package is told how to install it there", %{dir: dir} do
    python = answering(dir, ~s({"version": [3, 11, 2], "executable": "/usr/bin/python3", "dspy": null}))
    doctor = Doctor.run(python: python)
    refute doctor.ready
    assert %{status: :ok, found: "3.11.2"} = check(doctor, "Python")
    assert %{status: :missing, remedy: remedy} = check(doctor, "bridge_kernel")
    assert remedy =~ "/usr/bin/python3 -m pip install /"
    assert %{status: :absent, remedy: "Optional: /usr/bin/python3 -m pip" <> _} = check(doctor, "DSPy")
  end

  for {what, json, name, says} <- [
        {"that is too old", ~s({"version": [3, 9, 1], "executable": "/p", "dspy": null}), "Python", "3.11"},
        {"whose kernel speaks another protocol",
         ~s({"version": [3, 12, 1], "executable": "/p", "dspy": "3", "bridge_kernel": "9.0", "protocol": [2, 0]}),
         "bridge_kernel", "same release"},
        {"whose kernel is broken",
         ~s({"version": [3, 12, 1], "executable": "/p", "dspy": "3", "broken": "ImportError: no zmq"}), "bridge_kernel",
         "pip install"}
      ] do
    test "a Python #{what} is not taken", %{dir: dir} do
      doctor = Doctor.run(python: answering(dir, unquote(json)))
      refute doctor.ready
      assert %{status: :missing, remedy: remedy} = check(doctor, unquote(name))
      assert remedy =~ unquote(says)
    end
  end

  test "a program that is no Python, fails, floods or prints nonsense is named with what it said", %{dir: dir} do
    for {text, says} <- [
          {"exit 0", "nothing"},
          {"echo 'no such option' >&2; exit 3", "exit code 3: no such option"},
          {"echo '[1, 2]'", "[1, 2]"},
          {"printf '\\377\\376'", "answers"},
          {"yes no | head -c 3000000; echo '{}'", "{}"}
        ] do
      doctor = Doctor.run(python: program(dir, text))
      refute doctor.ready
      assert check(doctor, "Python").note =~ says
      assert is_binary(inspect(doctor))
    end

    refute_received _
  end

  test "a Python that does not answer is given up, and nothing of it is left", %{dir: dir} do
    python = program(dir, "echo $$ > #{dir}/pid; sleep 600 & exec sleep 600")
    doctor = Doctor.run(python: python, timeout: 2_000)
    assert check(doctor, "Python").note =~ "does not answer"
    pid = dir |> Path.join("pid") |> File.read!() |> String.trim()
    refute File.exists?("/proc/#{pid}/cmdline") and File.read!("/proc/#{pid}/cmdline") != ""
    refute_received _
  end
end
