defmodule Bridge.Telemetry do
  @moduledoc """
  What happened: to handlers, to a memory of the last 10,000 events, to figures.

      Bridge.Telemetry.attach("slow", [:bridge, :command, :stop], fn _event, measured, said, _config ->
        IO.inspect({said.subject, System.convert_time_unit(measured.duration, :native, :millisecond)})
      end, nil)

      Bridge.Telemetry.summary()

  Events have the shape of [`:telemetry`](https://hexdocs.pm/telemetry): a name, measurements, metadata. Where that
  library is loaded, every event goes through it, and `attach/4` is its `attach`; where it is not, the same functions
  work by themselves. `Bridge.Telemetry.Catalogue.events/0` has all events there are; durations are in native units.
  `metadata.bridge` says of which bridge it is. A member that is the user's own (`ctx.emit`, `ctx.span`) has a string for
  its name, and an event of the user's own is `[:bridge, :user]` with its name as `metadata.name`: nothing that comes
  from a kernel makes an atom.

  Secrets are in no event; arguments, results, prompts and completions only of sessions that ask for it (`capture/3`).

  Counting and remembering is done by the process that emits. There is no other that it could have to wait for.
  """

  use GenServer

  require Logger

  alias Bridge.{Config, Live}
  alias Bridge.Telemetry.{Catalogue, Event, Figures, Handlers, Intake, Log, Summary, Trace, Waterfall}

  @remembered 10_000
  @captures [:arguments, :results, :prompts, :completions]
  @log_levels [:debug, :info, :warning, :error]

  @type bridge :: atom() | %{:name => atom(), optional(any()) => any()}
  @type name :: [atom()]
  @type handler :: (name(), map(), map(), term() -> term())

  # -- the tables' owner -----------------------------------------------------------------------

  @doc false
  @spec start_link(struct()) :: GenServer.on_start()
  def start_link(cfg), do: GenServer.start_link(__MODULE__, cfg, name: Config.process(cfg.name, :telemetry))

  @doc false
  @spec child_spec(struct()) :: Supervisor.child_spec()
  def child_spec(cfg), do: %{id: __MODULE__, start: {__MODULE__, :start_link, [cfg]}}

  @impl true
  def init(cfg) do
    Process.flag(:trap_exit, true)
    Handlers.load()
    options = [:set, :public, write_concurrency: true]

    run = %{
      bridge: cfg.name,
      ring: :ets.new(__MODULE__, options),
      numbers: :atomics.new(4, []),
      figures: Figures.new(),
      captures: :ets.new(__MODULE__, [:set, :public, read_concurrency: true]),
      off: [],
      sampling: 1.0,
      log: Application.get_env(:bridge_host, :log, :info),
      live: if(Live.wanted?(), do: Live.start(cfg.name))
    }

    :persistent_term.put({__MODULE__, cfg.name}, run)
    {:ok, run}
  end

  @impl true
  def handle_call({:switch, fun}, _from, run) do
    run = fun.(run)
    # Read with each event, and changed by people, now and then.
    :persistent_term.put({__MODULE__, run.bridge}, run)
    {:reply, :ok, run}
  end

  def handle_call({:live, wanted?}, _from, run) do
    run = put_live(run, wanted?)
    {:reply, :ok, run}
  end

  @impl true
  def handle_info({:EXIT, pid, reason}, %{live: {pid, _pending}} = run) do
    Logger.warning("commands are not shown any more while they run: #{Bridge.Private.format_exit(reason)}")
    {:noreply, put_live(%{run | live: nil}, false)}
  end

  # The exit of whatever was linked, and what anybody sends to a name.
  def handle_info(_stray, run), do: {:noreply, run}

  defp put_live(run, wanted?) do
    live = if wanted?, do: run.live || Live.start(run.bridge)
    with {pid, _pending} <- run.live, true <- live == nil, do: GenServer.stop(pid)
    run = %{run | live: live}
    :persistent_term.put({__MODULE__, run.bridge}, run)
    run
  end

  @impl true
  def terminate(_reason, run), do: :persistent_term.erase({__MODULE__, run.bridge})

  defp run(bridge) when is_atom(bridge), do: :persistent_term.get({__MODULE__, bridge}, nil)
  defp run(%{name: bridge}), do: run(bridge)

  defp switch(bridge, fun) do
    name = if is_atom(bridge), do: bridge, else: bridge.name
    GenServer.call(Config.process(name, :telemetry), {:switch, fun}, :infinity)
  end

  # -- emitting ----------------------------------------------------------------------------------

  @doc "Emits an event: remembered, counted, told to handlers; unless it is switched off."
  @spec execute(bridge(), name(), map(), map()) :: :ok
  def execute(bridge, name, measurements, metadata) do
    case run(bridge) do
      nil -> :ok
      %{off: off} = run when off != [] -> if off?(off, name), do: :ok, else: take(run, name, measurements, metadata)
      run -> take(run, name, measurements, metadata)
    end
  end

  @doc "Counts an event of a trace that is not recorded: the figures are of all commands."
  @spec count(bridge(), name(), map(), map()) :: :ok
  def count(bridge, name, measurements, metadata) do
    case run(bridge) do
      nil -> :ok
      run -> if off?(run.off, name), do: :ok, else: counted(run, name, measurements, metadata)
    end
  end

  @doc "Emits an event of yours, `[:bridge, :user]` with its name in the metadata, as `ctx.emit` does in a kernel."
  @spec emit(String.t(), map(), map(), keyword()) :: :ok
  def emit(name, measurements \\ %{}, metadata \\ %{}, opts \\ []) when is_binary(name) do
    execute(Keyword.get(opts, :bridge, Bridge), [:bridge, :user], measurements, Map.put(metadata, :name, name))
  end

  @doc """
  Measures what the function does, commands included, as an event `[:bridge, :span, …]`; returns what it returns.

      Bridge.Telemetry.span("import", fn -> … end, metadata: %{rows: 3})

  `traceparent:` is the W3C header of whoever asked for it. Within, `traceparent/0` is the one to hand on.
  """
  @spec span(String.t(), (() -> result), keyword()) :: result when result: term()
  def span(name, fun, opts \\ []) when is_binary(name) and is_function(fun, 0) do
    bridge = Keyword.get(opts, :bridge, Bridge)
    {header, metadata} = {opts[:traceparent], Keyword.get(opts, :metadata, %{})}

    if header && not Trace.traceparent?(header) do
      raise ArgumentError,
            "a traceparent is 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, not #{inspect(header, printable_limit: 80)}"
    end

    trace = Trace.child_of(header || Trace.current(), header != nil or sampled?(bridge))
    said = metadata |> Map.put(:name, name) |> Map.merge(Trace.metadata(trace))
    measure = fn -> measure(bridge, [:bridge, :span], said, fun) end
    Trace.within(trace, if(trace.sampled, do: measure, else: fun))
  end

  @doc """
  Emits `prefix ++ [:start]`, runs the function, emits `[:stop]` or `[:exception]` with the duration; returns what it
  returns, or raises what it raised.
  """
  @spec measure(bridge(), name(), map(), (() -> result)) :: result when result: term()
  def measure(bridge, prefix, metadata, fun) do
    execute(bridge, prefix ++ [:start], %{system_time: System.system_time()}, metadata)
    began = System.monotonic_time()

    try do
      fun.()
    catch
      kind, reason ->
        measured = %{duration: System.monotonic_time() - began}
        execute(bridge, prefix ++ [:exception], measured, Map.put(metadata, :error, type_of(kind, reason)))
        :erlang.raise(kind, reason, __STACKTRACE__)
    else
      result ->
        execute(bridge, prefix ++ [:stop], %{duration: System.monotonic_time() - began}, metadata)
        result
    end
  end

  @doc "The type of an error, as events say it: `bridge.KernelDied`, `ArgumentError`, `exit`."
  @spec type_of(:error | :exit | :throw, term()) :: String.t()
  def type_of(:error, %Bridge.Error{type: type}), do: type
  def type_of(:error, reason), do: inspect(Exception.normalize(:error, reason).__struct__)
  def type_of(kind, _reason), do: Atom.to_string(kind)

  defp take(run, name, measurements, metadata) do
    metadata = Map.put(metadata, :bridge, run.bridge)
    remember(run, name, measurements, metadata)
    Log.event(run.log, name, measurements, metadata)
    if run.live, do: Live.event(run.live, name, measurements, metadata)

    for {id, error} <- Handlers.tell(name, measurements, metadata) do
      execute(run.bridge, [:bridge, :telemetry, :detach], %{}, %{handler: handler_name(id), error: error})
    end

    :ok
  end

  defp handler_name(id) when is_binary(id), do: id
  defp handler_name(id), do: inspect(id)

  defp remember(run, name, measurements, metadata) do
    n = :atomics.add_get(run.numbers, 1, 1)
    :ets.insert(run.ring, {rem(n, @remembered), n, System.system_time(), name, measurements, metadata})
    Figures.count(run.figures, name, measurements, metadata)
  rescue
    # The tables went with their owner, which is being started anew: nothing can be remembered now.
    error in ArgumentError -> if gone?(run), do: :ok, else: reraise(error, __STACKTRACE__)
  end

  defp counted(run, name, measurements, metadata) do
    Figures.count(run.figures, name, measurements, metadata)
  rescue
    error in ArgumentError -> if gone?(run), do: :ok, else: reraise(error, __STACKTRACE__)
  end

  defp gone?(run), do: :ets.info(run.ring) == :undefined or :ets.info(run.figures.table) == :undefined

  @doc """
  Takes what a kernel displays for its commands: the list of batches beneath `application/vnd.bridge.telemetry.v1+json`,
  decoded. `secrets:` are texts that must not be shown, however its commands came by them: a list, or a function that
  has those of a session.
  """
  @spec ingest(bridge(), term(), String.t() | nil, keyword()) :: :ok
  def ingest(bridge, batches, kernel_id, opts \\ []) do
    case run(bridge) do
      nil ->
        :ok

      run ->
        tell = fn name, measurements, metadata, shared ->
          execute(run.bridge, name, measurements, metadata)
          if run.live, do: Live.told(run.live, shared["parent_span_id"], name, measurements, metadata)
        end

        {unknown, refused} = Intake.read(batches, kernel_id, Keyword.get(opts, :secrets, []), tell)
        if unknown > 0, do: :atomics.add(run.numbers, 2, unknown)
        if refused > 0, do: :atomics.add(run.numbers, 3, refused)
        :ok
    end
  end

  # -- handlers ------------------------------------------------------------------------------------

  @doc """
  Calls `fun.(event, measurements, metadata, config)` for each event whose name begins with `prefix`.

  It is called in the process that emits. A handler that fails is detached, with a warning: it never breaks a command.
  """
  @spec attach(term(), name(), handler(), term()) :: :ok | {:error, :already_exists}
  def attach(id, prefix, fun, config \\ nil), do: attach_many(id, [prefix], fun, config)

  @doc "As `attach/4`, for several beginnings of names."
  @spec attach_many(term(), [name()], handler(), term()) :: :ok | {:error, :already_exists}
  def attach_many(id, prefixes, fun, config \\ nil) when is_list(prefixes) and is_function(fun, 4) do
    Handlers.attach(id, prefixes, fun, config)
  end

  @doc "Calls the handler no more."
  @spec detach(term()) :: :ok | {:error, :not_found}
  def detach(id), do: Handlers.detach(id)

  # -- switches --------------------------------------------------------------------------------------

  @doc "Records no events whose names begin so, here and in kernels, from the next command on."
  @spec disable(name(), keyword()) :: :ok
  def disable(prefix \\ [:bridge], opts \\ []) when is_list(prefix) do
    switch(Keyword.get(opts, :bridge, Bridge), fn run -> %{run | off: Enum.sort(Enum.uniq([prefix | run.off]))} end)
  end

  @doc "Records them again: all that `disable/2` was told whose names begin so."
  @spec enable(name(), keyword()) :: :ok
  def enable(prefix \\ [:bridge], opts \\ []) when is_list(prefix) do
    switch(Keyword.get(opts, :bridge, Bridge), fn run ->
      %{run | off: Enum.reject(run.off, &List.starts_with?(&1, prefix))}
    end)
  end

  @doc "What `disable/2` was told."
  @spec disabled(bridge()) :: [name()]
  def disabled(bridge \\ Bridge), do: with(%{off: off} <- run(bridge), do: off) || []

  @doc "Records this share of the traces, 0 to 1. The figures count all commands."
  @spec sampling(number(), keyword()) :: :ok
  def sampling(share, opts \\ []) when is_number(share) and share >= 0 and share <= 1 do
    switch(Keyword.get(opts, :bridge, Bridge), &%{&1 | sampling: share * 1.0})
  end

  @doc """
  Says what events may hold of a session's values: some of `:arguments`, `:results`, `:prompts`, `:completions`.

  Each is clipped at 4,096 characters, secrets are redacted. It is in no store: a session that is opened again captures
  nothing.
  """
  @spec capture(String.t() | struct(), [atom()], keyword()) :: :ok
  def capture(session, what, opts \\ []) when is_list(what) do
    {bridge, id} = of_session(session, opts)

    case what -- @captures do
      [] -> :ok
      more -> raise ArgumentError, "there is #{inspect(@captures)} to capture, not #{inspect(more)}"
    end

    with %{captures: table} <- run(bridge) do
      if what == [], do: :ets.delete(table, id), else: :ets.insert(table, {id, Enum.sort(Enum.uniq(what))})
    end

    :ok
  end

  @doc "Forgets what a session captures: it is gone."
  @spec forget(String.t() | struct(), keyword()) :: :ok
  def forget(session, opts \\ []), do: capture(session, [], opts)

  defp of_session(%{__struct__: Bridge.Session, bridge: bridge, id: id}, _opts), do: {bridge, id}
  defp of_session(id, opts) when is_binary(id), do: {Keyword.get(opts, :bridge, Bridge), id}

  @doc "Which messages are logged: from this level on; `false`: none. At first `config :bridge_host, log: :info`."
  @spec log(Logger.level() | false, keyword()) :: :ok
  def log(level, opts \\ []) when level == false or level in @log_levels do
    switch(Keyword.get(opts, :bridge, Bridge), &%{&1 | log: level})
  end

  @doc """
  Whether commands are shown in Livebook while they run. They are, unless it is switched off, where Kino is loaded.
  """
  @spec live(boolean(), keyword()) :: :ok
  def live(wanted?, opts \\ []) when is_boolean(wanted?) do
    GenServer.call(Config.process(Keyword.get(opts, :bridge, Bridge), :telemetry), {:live, wanted?}, :infinity)
  end

  # -- for the engine ----------------------------------------------------------------------------------

  @doc "What a command of this session tells its kernel (`telemetry` in its parameters); nil if it is what a kernel does anyway."
  @spec params(bridge(), String.t()) :: %{String.t() => list()} | nil
  def params(bridge, session) do
    with %{off: off, captures: table} <- run(bridge) do
      capture = for {_id, what} <- looked_up(table, session), one <- what, do: Atom.to_string(one)
      off = for name <- off, do: Enum.map(name, &Atom.to_string/1)
      said = for {name, list} <- [{"off", off}, {"capture", capture}], list != [], into: %{}, do: {name, list}
      if said == %{}, do: nil, else: said
    end
  end

  defp looked_up(table, session) do
    :ets.lookup(table, session)
  rescue
    error in ArgumentError -> if :ets.info(table) == :undefined, do: [], else: reraise(error, __STACKTRACE__)
  end

  @doc "Whether a trace that begins now is recorded."
  @spec sampled?(bridge()) :: boolean()
  def sampled?(bridge) do
    case run(bridge) do
      %{sampling: share} when share < 1.0 -> :rand.uniform() < share
      _everything -> true
    end
  end

  @doc "Whether everything is switched off."
  @spec silent?(bridge()) :: boolean()
  def silent?(bridge), do: off?(disabled(bridge), [:bridge])

  @doc "A new span for a command: beneath the current one of this process, else the root of a trace."
  @spec trace(bridge()) :: Trace.t()
  def trace(bridge), do: Trace.child_of(Trace.current(), sampled?(bridge))

  @doc "The W3C header that says: beneath the span that is current in this process; nil if there is none."
  @spec traceparent() :: String.t() | nil
  def traceparent, do: with(%Trace{} = trace <- Trace.current(), do: Trace.traceparent(trace))

  defp off?(off, name), do: Enum.any?(off, &List.starts_with?(name, &1))

  # -- what happened -------------------------------------------------------------------------------------

  @doc "The last 10,000 events whose names begin with `prefix`, oldest first."
  @spec events(bridge(), name()) :: [Event.t()]
  def events(bridge \\ Bridge, prefix \\ []) do
    asked(bridge, [], fn run ->
      for {_place, _n, at, name, measurements, metadata} <- Enum.sort_by(:ets.tab2list(run.ring), &elem(&1, 1)),
          List.starts_with?(name, prefix) do
        %Event{name: name, measurements: measurements, metadata: metadata, at: at}
      end
    end)
  end

  @doc """
  What happened in one trace, as a waterfall: of a trace's id or a command's; without one, of the last command.
  """
  @spec waterfall(String.t() | nil, keyword()) :: {:ok, Waterfall.t()} | {:error, Bridge.Error.t()}
  def waterfall(id \\ nil, opts \\ []) do
    with :error <- opts |> Keyword.get(:bridge, Bridge) |> events() |> Waterfall.of(id) do
      Bridge.Error.error(
        :not_found,
        "nothing is remembered of #{if id, do: "trace #{inspect(id)}", else: "any command"}",
        remedy: "Of the last #{@remembered} events there is something: Bridge.Telemetry.events()."
      )
    end
  end

  @doc "How long commands take: count, errors, percentiles in nanoseconds; those first that took most."
  @spec latencies(bridge()) :: [map()]
  def latencies(bridge \\ Bridge), do: asked(bridge, [], &Figures.latencies(&1.figures))

  @doc "Errors by type: how often, of which commands or tools."
  @spec errors(bridge()) :: [map()]
  def errors(bridge \\ Bridge), do: asked(bridge, [], &Figures.errors(&1.figures))

  @doc "Kernels: life, memory, commands."
  @spec kernels(bridge()) :: [map()]
  def kernels(bridge \\ Bridge), do: asked(bridge, [], &Figures.kernels(&1.figures))

  @doc "Language models: calls, tokens, cost, cache hits, latency."
  @spec models(bridge()) :: [map()]
  def models(bridge \\ Bridge), do: asked(bridge, [], &Figures.models(&1.figures))

  @doc "The last minute: rates, percentiles, a count for each second."
  @spec recent(bridge()) :: map() | nil
  def recent(bridge \\ Bridge), do: asked(bridge, nil, &Figures.recent(&1.figures))

  @doc "All figures: shows itself as tables."
  @spec summary(bridge()) :: Summary.t()
  def summary(bridge \\ Bridge) do
    [events, unknown, refused] = asked(bridge, [0, 0, 0], fn run -> Enum.map(1..3, &:atomics.get(run.numbers, &1)) end)

    %Summary{
      events: events,
      unknown: unknown,
      refused: refused,
      recent: recent(bridge),
      latencies: latencies(bridge),
      errors: errors(bridge),
      kernels: kernels(bridge),
      models: models(bridge)
    }
  end

  defp asked(bridge, otherwise, fun) do
    case run(bridge) do
      nil -> otherwise
      run -> if gone?(run), do: otherwise, else: fun.(run)
    end
  end

  @doc "Every event there is: `Bridge.Telemetry.Catalogue.events/0`."
  @spec catalogue() :: [Catalogue.event()]
  defdelegate catalogue, to: Catalogue, as: :events
end
