defmodule Bridge.Config do
  @moduledoc false
  # The options of one bridge, checked once, and the names of its processes and tables.

  alias Bridge.Error

  # Its environment is where a kernel's API keys are: in a function, which shows nothing, whoever shows it.
  @enforce_keys [:name]
  defstruct [
    :name,
    :python,
    :runtime_dir,
    :store,
    :ttl,
    :breaker,
    :attach,
    kernels: 1,
    arguments: [],
    env: nil,
    quota: %{},
    retries: 2,
    heartbeat: 30_000,
    concurrency: 64,
    queue: 10_000,
    routing: :fastest,
    recycle: %{},
    start_timeout: 60_000,
    max_message_bytes: 0x1000_0000,
    shutdown: 30_000,
    on_output: nil
  ]

  @type t :: %__MODULE__{}
  @type role :: :store | :pool | :telemetry | :tools | :kernels | :commands | :tool_tasks | :keys | :owner

  @options [
    :name,
    :kernels,
    :python,
    :arguments,
    :env,
    :store,
    :quota,
    :ttl,
    :retries,
    :heartbeat,
    :concurrency,
    :queue,
    :routing,
    :breaker,
    :recycle,
    :start_timeout,
    :shutdown,
    :on_output
  ]
  @quotas [:things, :bytes, :history]
  @recycles [:commands, :age, :rss_bytes]
  @routings [:fastest, :least_loaded, :random]
  @roles %{
    store: Store,
    pool: Pool,
    telemetry: Telemetry,
    tools: Tools,
    kernels: Kernels,
    commands: Commands,
    tool_tasks: ToolTasks,
    keys: Keys,
    owner: Owner
  }

  @doc "The options of `Bridge.start_link/1`, checked; ArgumentError says which is wrong and what it takes."
  @spec new!(keyword()) :: t()
  def new!(opts) do
    names = Keyword.keys(opts)

    case Enum.reject(names, &(&1 in @options)) do
      [] -> :ok
      [name | _] -> wrong("there is no option #{inspect(name)}; there are #{Enum.map_join(@options, ", ", &inspect/1)}")
    end

    case names -- Enum.uniq(names) do
      [] -> :ok
      [name | _] -> wrong("#{name}: is given twice")
    end

    cfg = struct!(__MODULE__, Keyword.put_new(opts, :name, Bridge))

    check(is_atom(cfg.name) and cfg.name not in [nil, true, false], :name, "an atom", cfg.name)
    check(whole?(cfg.kernels, 0) and cfg.kernels <= 1_000, :kernels, "how many to start, 0 to 1,000", cfg.kernels)
    check(strings?(cfg.arguments), :arguments, "a list of strings", cfg.arguments)
    check(whole?(cfg.retries, 0), :retries, "how often a command may run again, 0 or more", cfg.retries)

    check(
      whole?(cfg.concurrency, 1),
      :concurrency,
      "how many commands a kernel runs at once, 1 or more",
      cfg.concurrency
    )

    check(whole?(cfg.queue, 0), :queue, "how many commands may wait, 0 or more", cfg.queue)
    check(cfg.heartbeat == nil or whole?(cfg.heartbeat, 1), :heartbeat, "milliseconds, or nil", cfg.heartbeat)
    check(cfg.ttl == nil or whole?(cfg.ttl, 1), :ttl, "milliseconds, or nil: for ever", cfg.ttl)
    check(whole?(cfg.start_timeout, 1), :start_timeout, "milliseconds, more than 0", cfg.start_timeout)
    check(whole?(cfg.shutdown, 0), :shutdown, "milliseconds", cfg.shutdown)
    check(cfg.python == nil or is_binary(cfg.python), :python, "the path of a Python, or nil", cfg.python)
    check(cfg.store == nil or is_binary(cfg.store), :store, "the path of a directory, or nil", cfg.store)

    check(
      cfg.routing in @routings or is_function(cfg.routing, 2),
      :routing,
      inspect(@routings) <> ", or a function of what is asked and the kernels, which gives the id of one",
      cfg.routing
    )

    check(
      cfg.on_output == nil or is_function(cfg.on_output, 1),
      :on_output,
      "a function of one argument",
      cfg.on_output
    )

    check(members?(cfg.quota, @quotas), :quota, "a map with some of #{inspect(@quotas)}, whole numbers", cfg.quota)

    check(
      members?(cfg.recycle, @recycles),
      :recycle,
      "a map with some of #{inspect(@recycles)}, whole numbers",
      cfg.recycle
    )

    check(cfg.breaker == nil or is_map(cfg.breaker), :breaker, "a map, or nil", cfg.breaker)
    if problem = cfg.breaker && Bridge.Pool.Breaker.problem(cfg.breaker), do: wrong("breaker: " <> problem)

    %{cfg | env: env(cfg.env), quota: Map.new(cfg.quota), recycle: Map.new(cfg.recycle)}
  end

  defp check(true, _name, _takes, _value), do: :ok
  defp check(_false, name, takes, value), do: wrong("#{name}: is #{takes}, not #{inspect(value, printable_limit: 80)}")

  defp wrong(message), do: raise(ArgumentError, message)

  defp whole?(value, least), do: is_integer(value) and value >= least
  defp strings?(list), do: is_list(list) and Enum.all?(list, &is_binary/1)

  defp members?(given, names) do
    (is_map(given) or Keyword.keyword?(given)) and
      Enum.all?(given, fn {name, value} -> name in names and (value == nil or whole?(value, 1)) end)
  end

  defp env(nil), do: fn -> %{} end

  defp env(env) when is_map(env) or is_list(env) do
    if Enum.all?(env, &match?({_name, _value}, &1)) do
      env = Map.new(env, fn {name, value} -> {to_string(name), value && to_string(value)} end)
      fn -> env end
    else
      env(:other)
    end
  end

  # As it is hidden by `hide_env/1`.
  defp env(env) when is_function(env, 0), do: env(env.())
  defp env(_other), do: wrong("env: is a map of strings")

  @doc "The same options, which show nothing of the environment: a supervisor's reports show how its children are started."
  @spec hide_env(keyword()) :: keyword()
  def hide_env(opts) do
    case opts[:env] do
      env when is_map(env) or is_list(env) -> Keyword.put(opts, :env, fn -> env end)
      _none -> opts
    end
  end

  @doc "The Python to start kernels with, if none is named."
  @spec python() :: String.t()
  def python, do: System.get_env("BRIDGE_PYTHON") || "python3"

  @doc "The options of a bridge that is running."
  @spec fetch(atom()) :: {:ok, t()} | {:error, Error.t()}
  def fetch(bridge) do
    case :persistent_term.get({__MODULE__, bridge}, nil) do
      nil -> Error.error(:host_closed, "#{inspect(bridge)} is not running", remedy: start(bridge))
      cfg -> {:ok, cfg}
    end
  end

  defp start(Bridge), do: Error.new(:host_closed).remedy
  defp start(bridge), do: "Start it: Bridge.start_link(name: #{inspect(bridge)})."

  @doc "The bridges that run."
  @spec running() :: [atom()]
  def running do
    for {{__MODULE__, name}, _cfg} <- :persistent_term.get(), Process.whereis(process(name, :keys)) != nil, do: name
  end

  @spec put(t()) :: :ok
  def put(cfg), do: :persistent_term.put({__MODULE__, cfg.name}, cfg)

  @spec delete(t()) :: boolean()
  def delete(cfg), do: :persistent_term.erase({__MODULE__, cfg.name})

  @doc "The registered name of a bridge's process or table."
  @spec process(atom(), role()) :: atom()
  def process(bridge, role), do: Module.concat(bridge, Map.fetch!(@roles, role))
end
