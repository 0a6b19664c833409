defmodule Mix.Tasks.Bridge.Gen do
  @shortdoc "Writes a wrapper module for a Python class"

  @moduledoc """
  Writes a wrapper module for a Python class, module or function: documented, typed, and without macros.

      $ mix bridge.gen Dspy.Predict dspy.Predict
      $ mix bridge.gen Py.Math math --output lib/py/math.ex --force

  It starts a kernel, asks it what there is (`object.inspect`), and writes `lib/dspy/predict.ex`, formatted as this project
  is. Nothing of the Python class is called. A file that is there already is kept, unless `--force` says otherwise.

  ## Options

    * `--output PATH`: where to write; `-` prints it
    * `--force`: write over a file that is there
    * `--python PATH`: the Python of the kernel
    * `--inspected PATH`: read the answer of `object.inspect` from this JSON file; no kernel is started
    * `--save PATH`: keep that answer, to be given as `--inspected` later
  """
  use Mix.Task

  alias Bridge.{Gen, Inspected}

  @switches [output: :string, force: :boolean, python: :string, inspected: :string, save: :string]

  @impl Mix.Task
  def run(argv) do
    case OptionParser.parse(argv, strict: @switches) do
      {opts, [module, path], []} ->
        generate(module, path, opts)

      {_opts, _args, [{switch, _} | _]} ->
        Mix.raise("#{switch} is no option of mix bridge.gen, or has no value")

      {_opts, _args, []} ->
        Mix.raise("mix bridge.gen takes a module and a Python name: mix bridge.gen Dspy.Predict dspy.Predict")
    end
  end

  defp generate(module, path, opts) do
    output = opts[:output] || "lib/#{Macro.underscore(module)}.ex"

    if output != "-" and File.exists?(output) and not Keyword.get(opts, :force, false) do
      Mix.raise("#{output} is there already: --force writes over it")
    end

    # The name is looked at before a kernel is started for it.
    unwrap(Gen.check_name(module))
    check_free(module)
    inspected = inspected(path, opts)
    if opts[:save], do: File.write!(opts[:save], Bridge.JSON.encode!(Gen.said(inspected)))
    source = unwrap(Gen.source(inspected, module))

    if output == "-" do
      Mix.shell().info(source)
    else
      {format, _opts} = Mix.Tasks.Format.formatter_for_file(output)
      File.mkdir_p!(Path.dirname(output))
      File.write!(output, format.(source))
      Mix.shell().info([:green, "* creating ", :reset, output])
    end
  end

  # Written over, one of Elixir's own modules would end every mix task of this project.
  defp check_free(module) do
    owner = Application.get_application(Module.concat([module]))

    if owner not in [nil, Mix.Project.config()[:app]] do
      Mix.raise("there is a module #{module} already, of #{owner}: choose another name")
    end
  end

  defp inspected(path, opts) do
    if file = opts[:inspected] do
      case file |> File.read!() |> Bridge.JSON.decode() do
        {:ok, %{"kind" => _} = said} -> Inspected.new(said)
        _other -> Mix.raise("#{file} holds no answer of object.inspect")
      end
    else
      ask(path, opts)
    end
  end

  defp ask(path, opts) do
    Mix.Task.run("app.start")
    {:ok, bridge} = Bridge.start_link([name: Bridge.Gen.Host, kernels: 1] ++ Keyword.take(opts, [:python]))

    try do
      unwrap(Bridge.inspect_object(path, bridge: Bridge.Gen.Host))
    after
      Supervisor.stop(bridge)
    end
  end

  defp unwrap(:ok), do: :ok
  defp unwrap({:ok, value}), do: value
  defp unwrap({:error, error}), do: Mix.raise(Exception.message(error))
end
