defmodule Bridge.Doctor do
  @moduledoc """
  What Bridge finds on this machine, what is missing, and how to get it: `Bridge.doctor/1`.

  It is a value: `ready` says whether kernels can be started, `checks` has what was looked at. Inspecting it shows a table.
  Nothing is installed, and no kernel is started; Python is run once.
  """

  alias Bridge.{Config, Error}
  alias Bridge.Kernel.Launch

  @elixir "1.14.0"
  @otp 25
  @python {3, 11}
  @protocol 1
  @most_bytes 65_536

  @enforce_keys [:ready, :checks]
  defstruct [:ready, :checks]

  @typedoc """
  `:ok`, `:missing` (Bridge does not work without it), or `:absent` (it does). `found` is a version or nil; `note` says
  where it is or what it is for; `remedy` how to get it.
  """
  @type check :: %{
          name: String.t(),
          status: :ok | :missing | :absent,
          found: String.t() | nil,
          note: String.t(),
          remedy: String.t()
        }
  @type t :: %__MODULE__{ready: boolean(), checks: [check()]}

  # Answers with one line of JSON, whatever is installed; imports only what it must, for `dspy` alone takes seconds.
  @probe """
  import importlib.metadata as metadata, importlib.util as util, json, sys
  def version(name):
      try:
          return metadata.version(name)
      except metadata.PackageNotFoundError:
          return None
  found = {"version": list(sys.version_info[:3]), "executable": sys.executable, "dspy": version("dspy")}
  if util.find_spec("bridge_kernel") is not None:
      try:
          from bridge_kernel._version import __version__
          from bridge_kernel.contract.messages import PROTOCOL_VERSION
          found |= {"bridge_kernel": __version__, "protocol": list(PROTOCOL_VERSION)}
      except Exception as exc:
          found |= {"broken": f"{type(exc).__name__}: {exc}"}
  print("\\n" + json.dumps(found))
  """

  @doc """
  Look. `python:` is the Python to look at (that of the bridge named by `bridge:`, if it runs, else what one would be started with),
  `timeout:` how many ms it may take to answer.
  """
  @spec run(keyword()) :: t()
  def run(opts \\ []) do
    python = Keyword.get_lazy(opts, :python, fn -> python_of(Keyword.get(opts, :bridge, Bridge)) end)

    checks =
      [elixir(), otp(), json()] ++
        python(python, Keyword.get(opts, :timeout, 30_000)) ++
        [
          library(:telemetry, ":telemetry", "events go to Bridge's own handlers, with the same functions", "~> 1.0"),
          library(Kino, "Kino", "nothing is shown live; results have text", "~> 0.14"),
          library(Nx, "Nx", "arrays are {type, shape, binary}", "~> 0.9"),
          library(Decimal, "Decimal", "decimals are a struct of Bridge's", "~> 2.0")
        ]

    %__MODULE__{ready: Enum.all?(checks, &(&1.status != :missing)), checks: checks}
  end

  defp python_of(bridge) do
    case Config.fetch(bridge) do
      {:ok, cfg} -> cfg.python
      {:error, _not_running} -> Config.python()
    end
  end

  # -- this side -----------------------------------------------------------------------------

  defp elixir do
    found = System.version()

    if Version.compare(found, @elixir) == :lt,
      do: missing("Elixir", found, "", "Bridge needs Elixir #{@elixir} or later."),
      else: ok("Elixir", found, "")
  end

  defp otp do
    found = System.otp_release()

    if String.to_integer(found) < @otp,
      do: missing("OTP", found, "", "Bridge needs OTP #{@otp} or later."),
      else: ok("OTP", found, "")
  end

  defp json do
    case Bridge.JSON.backend() do
      {:ok, module} -> ok("JSON", inspect(module), "")
      {:error, error} -> missing("JSON", nil, "what reads it", error.remedy)
    end
  end

  defp library(module, name, without, requirement) do
    if Code.ensure_loaded?(module) do
      ok(name, version_of(module), "")
    else
      app = module |> inspect() |> String.trim_leading(":") |> Macro.underscore()
      remedy = "Optional: Mix.install([…, {:#{app}, \"#{requirement}\"}])"
      %{name: name, status: :absent, found: nil, note: "without it " <> without, remedy: remedy}
    end
  end

  defp version_of(module) do
    with app when app != nil <- Application.get_application(module),
         version when version != nil <- Application.spec(app, :vsn) do
      to_string(version)
    else
      # Loaded, but of no application: compiled in this session.
      nil -> "loaded"
    end
  end

  # -- Python ------------------------------------------------------------------------------------

  defp python(python, timeout) do
    with {:ok, path} <- Launch.find_python(python),
         {:ok, found} <- ask(path, timeout) do
      [python_check(found), kernel_check(found), dspy_check(found)]
    else
      {:error, %Error{} = error} ->
        [
          missing("Python", nil, error.message, error.remedy),
          missing("bridge_kernel", nil, "there is no Python to have it", install("python3"))
        ]
    end
  end

  defp python_check(%{"version" => version, "executable" => executable}) do
    shown = Enum.join(version, ".")
    {major, minor} = @python

    if version < [major, minor],
      do:
        missing("Python", shown, executable, "Bridge needs Python #{major}.#{minor} or later: {Bridge, python: \"…\"}."),
      else: ok("Python", shown, executable)
  end

  defp kernel_check(%{"bridge_kernel" => version, "protocol" => [@protocol | _] = protocol}) do
    ok("bridge_kernel", version, "protocol #{Enum.join(protocol, ".")}")
  end

  defp kernel_check(%{"bridge_kernel" => version, "protocol" => protocol} = found) do
    note = "it speaks protocol #{Enum.join(protocol, ".")}, this host #{@protocol}"
    missing("bridge_kernel", version, note, install(found["executable"]) <> " Both from the same release.")
  end

  defp kernel_check(%{"broken" => why} = found) do
    missing("bridge_kernel", nil, "it is there but cannot be imported: #{why}", install(found["executable"]))
  end

  defp kernel_check(found), do: missing("bridge_kernel", nil, "not in that Python", install(found["executable"]))

  defp dspy_check(%{"dspy" => version}) when is_binary(version), do: ok("DSPy", version, "")

  defp dspy_check(found) do
    remedy = "Optional: #{found["executable"]} -m pip install 'bridge-kernel[dspy]'"
    %{name: "DSPy", status: :absent, found: nil, note: "without it there are no dspy.* commands", remedy: remedy}
  end

  defp install(python), do: "#{python} -m pip install #{package()}."

  # What there is to install it from: where Bridge itself was compiled from, if that is the whole of it.
  @checkout Path.expand("../../../..", __DIR__)

  @doc false
  @spec package() :: String.t()
  def package, do: if(File.regular?(Path.join(@checkout, "pyproject.toml")), do: @checkout, else: "bridge-kernel")

  # As kernels are started: no shell, no input. What it prints is bounded, and so is its time.
  defp ask(path, timeout) do
    options = [:binary, :exit_status, :stderr_to_stdout, :hide, args: ["-c", @probe]]
    port = Port.open({:spawn_executable, path}, options)
    timer = Process.send_after(self(), {port, :out_of_time}, timeout)
    answer = collect(port, "", path)
    Process.cancel_timer(timer)

    receive do
      {^port, :out_of_time} -> answer
    after
      0 -> answer
    end
  end

  defp collect(port, said, path) do
    receive do
      {^port, {:data, more}} ->
        said = said <> more
        collect(port, binary_part(said, max(0, byte_size(said) - @most_bytes), min(byte_size(said), @most_bytes)), path)

      {^port, {:exit_status, 0}} ->
        understand(said, path)

      {^port, {:exit_status, status}} ->
        unusable(path, "it ended with #{Launch.describe_status(status)}: #{last_line(said)}")

      {^port, :out_of_time} ->
        give_up(port)
        unusable(path, "it does not answer")
    end
  end

  defp give_up(port) do
    with {:os_pid, os_pid} <- Port.info(port, :os_pid) do
      # The leader of its own group, as everything that a port starts.
      System.cmd("sh", ["-c", "kill -s KILL -- \"-$1\" 2>/dev/null", "sh", Integer.to_string(os_pid)])
      # It is gone now, and says so: that must not stay in the caller's mailbox.
      receive do
        {^port, {:exit_status, _}} -> :ok
      after
        # Something that left the group holds its output.
        1_000 -> Port.close(port)
      end
    end
  end

  defp understand(said, path) do
    case said |> last_line() |> Bridge.JSON.decode() do
      {:ok, %{"version" => [_ | _], "executable" => _} = found} -> {:ok, found}
      _ -> unusable(path, "it answers: #{last_line(said)}")
    end
  end

  defp last_line(said) do
    line = said |> String.split("\n", trim: true) |> List.last("nothing") |> String.slice(0, 2_000)
    if String.valid?(line), do: line, else: inspect(line)
  end

  defp unusable(path, why) do
    Error.error(:kernel_start_failed, "#{path} is no Python that works: #{why}",
      remedy:
        "Install Python #{elem(@python, 0)}.#{elem(@python, 1)} or later, or name another: {Bridge, python: \"…\"}."
    )
  end

  defp ok(name, found, note), do: %{name: name, status: :ok, found: found, note: note, remedy: ""}
  defp missing(name, found, note, remedy), do: %{name: name, status: :missing, found: found, note: note, remedy: remedy}

  defimpl Inspect do
    import Inspect.Algebra

    @signs %{ok: "ok", missing: "MISSING", absent: "-"}

    def inspect(doctor, _opts) do
      rows = Enum.map(doctor.checks, &[@signs[&1.status], &1.name, &1.found || "", &1.note])
      widths = for column <- 0..2, do: rows |> Enum.map(&String.length(Enum.at(&1, column))) |> Enum.max()

      lines =
        Enum.zip_with(rows, doctor.checks, fn [sign, name, found, note], check ->
          cells = Enum.zip_with([sign, name, found], widths, &String.pad_trailing/2)
          line = "  " <> (Enum.join(cells ++ [note], "  ") |> String.trim_trailing())
          indent = String.duplicate(" ", 2 + hd(widths) + 2)
          if check.remedy == "", do: [line], else: [line, indent <> check.remedy]
        end)

      title = if doctor.ready, do: "ready", else: "not ready, see MISSING"
      ["#Bridge.Doctor<#{title}" | List.flatten(lines)] |> Enum.intersperse(line()) |> concat() |> concat(">")
    end
  end
end
