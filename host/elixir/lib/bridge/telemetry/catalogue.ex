defmodule Bridge.Telemetry.Catalogue do
  @moduledoc """
  Every telemetry event there is, its measurements with their units and its metadata: docs/telemetry.md, as data.

  What comes from a kernel becomes atoms by this table alone.
  """

  import Bitwise

  # Of what a kernel measures: more is none of a clock's, nor of a counter's.
  @max_number 1 <<< 62
  # No kernel of ours writes a longer text: they are cut at 4,096 characters. And what an event of the user's own may add:
  # the last 10,000 are remembered.
  @max_text 4 * 4_096
  @max_own_bytes 65_536

  @type unit :: :ns | :epoch_ns | :bytes | :count | :tokens | :usd | :one
  @type event :: %{
          name: [atom()],
          by: :host | :kernel | :both,
          says: String.t(),
          open: boolean(),
          measurements: %{atom() => %{unit: unit(), optional: boolean()}},
          metadata: %{atom() => %{kind: :string | :integer | :boolean, optional: boolean(), nullable: boolean()}}
        }

  # {:maybe, …}: may be missing; {:null, …}: may be nil.
  trace = [trace_id: :string, span_id: :string, parent_span_id: {:null, :string}]
  session = [session: :string]
  kernel = [kernel: :string]
  command = [command: :string, subject: :string] ++ session
  run = command ++ kernel ++ [attempt: :integer] ++ trace
  reason = [reason: :string]
  process = kernel ++ [pid: {:null, :integer}]
  maybe = fn said -> for {name, kind} <- said, do: {name, {:maybe, kind}} end

  duration = [duration: :ns]
  system_time = [system_time: :epoch_ns]
  cached = command ++ maybe.(trace)

  of_execution =
    maybe.(queue: :ns, callbacks: :count, bytes_in: :bytes, bytes_out: :bytes, lm_calls: :count, tokens: :tokens)

  of_lm = maybe.(input_tokens: :tokens, output_tokens: :tokens, tokens: :tokens, cost: :usd, first_token: :ns)

  one = fn name, by, says, measurements, metadata, opts ->
    [%{name: name, by: by, says: says, measurements: measurements, metadata: metadata, open: opts[:open] || false}]
  end

  span = fn name, by, says, metadata, opts ->
    ended = metadata ++ (opts[:ended] || [])
    stop = duration ++ (opts[:stop] || [])
    failed = if Keyword.has_key?(ended, :error), do: ended, else: ended ++ [error: :string]
    failed = Keyword.put(failed, :error, :string)

    one.(name ++ [:start], by, says <> " begins.", system_time, metadata ++ (opts[:started] || []), opts) ++
      one.(name ++ [:stop], by, says <> " has ended well.", stop, ended, opts) ++
      one.(name ++ [:exception], by, says <> " has ended with an error.", stop, failed, opts)
  end

  arguments = [arguments: {:maybe, :string}]
  result = [result: {:maybe, :string}]

  all =
    span.(
      [:bridge, :command],
      :host,
      "A command, as the host that asked for it sees it: queue, all attempts and commit included,",
      command ++ [command_id: :string] ++ trace,
      stop: [attempts: :count]
    ) ++
      span.(
        [:bridge, :execution],
        :both,
        "A command's run in a kernel; a run whose kernel died is ended by the host. It",
        run,
        stop: of_execution,
        started: arguments,
        ended: [success: :boolean, error: {:null, :string}] ++ result
      ) ++
      one.(
        [:bridge, :execution, :progress],
        :kernel,
        "A command says how far it is.",
        maybe.(done: :one, total: :one),
        run ++ [message: {:maybe, :string}],
        []
      ) ++
      one.(
        [:bridge, :execution, :retry],
        :host,
        "A command whose kernel died is going to be run again.",
        [attempt: :count, recorded: :count],
        command ++ trace,
        []
      ) ++
      span.(
        [:bridge, :callback],
        :kernel,
        "A callback, as the kernel sees it,",
        run ++ [method: :string, about: :string],
        []
      ) ++
      span.(
        [:bridge, :tool],
        :host,
        "A tool's run in the host",
        [tool: :string] ++ session ++ [command_id: {:maybe, :string}] ++ maybe.(trace),
        started: arguments,
        ended: result
      ) ++
      span.(
        [:bridge, :instance],
        :kernel,
        "Making an instance from its recipe and state",
        run ++ [action: :string, class: :string],
        ended: [cache: {:maybe, :string}]
      ) ++
      span.(
        [:bridge, :span],
        :both,
        "A part that somebody measures with `span(name)`",
        [name: :string] ++ maybe.(Keyword.drop(run, Keyword.keys(trace))) ++ trace,
        open: true
      ) ++
      one.([:bridge, :user, :*], :both, "An event of the user's own: `emit(name, …)`.", [], [], open: true) ++
      span.([:bridge, :dspy, :module], :kernel, "A DSPy module's call", run ++ [module: :string], []) ++
      span.(
        [:bridge, :dspy, :lm],
        :kernel,
        "A language model's call",
        run ++ [model: :string],
        stop: of_lm,
        started: [prompt: {:maybe, :string}],
        ended: maybe.(response_model: :string, cache_hit: :boolean, streamed: :boolean, completion: :string)
      ) ++
      span.([:bridge, :dspy, :adapter], :kernel, "An adapter's work", run ++ [adapter: :string, action: :string], []) ++
      span.([:bridge, :dspy, :tool], :kernel, "A DSPy tool's call", run ++ [tool: :string], []) ++
      span.(
        [:bridge, :dspy, :evaluate],
        :kernel,
        "An evaluation",
        run ++ [metric: {:maybe, :string}],
        stop: maybe.(score: :one, examples: :count)
      ) ++
      span.([:bridge, :dspy, :optimizer], :kernel, "An optimizer's `compile`", run ++ [optimizer: :string], []) ++
      one.(
        [:bridge, :dspy, :optimizer, :progress],
        :kernel,
        "An optimizer has evaluated one more candidate.",
        [candidate: :count] ++ maybe.(score: :one, best: :one),
        run ++ [optimizer: :string],
        []
      ) ++
      one.([:bridge, :session, :start], :host, "A session is made.", system_time, session, []) ++
      one.([:bridge, :session, :stop], :host, "A session is gone.", system_time, session ++ reason, []) ++
      one.(
        [:bridge, :kernel, :start],
        :host,
        "A kernel is ready.",
        duration ++ system_time,
        process ++ [spare: :boolean, deaths: :integer],
        []
      ) ++
      one.(
        [:bridge, :kernel, :stop],
        :host,
        "A kernel has ended.",
        duration ++ system_time ++ [lost: :count],
        process ++ [exit_code: {:maybe, {:null, :integer}}, expected: :boolean] ++ reason,
        []
      ) ++
      one.(
        [:bridge, :kernel, :unresponsive],
        :host,
        "A kernel does not answer its heartbeat.",
        [silence: :ns, in_flight: :count],
        process ++ reason,
        []
      ) ++
      one.(
        [:bridge, :kernel, :memory],
        :host,
        "What a kernel uses, with each heartbeat that it answers.",
        [rss: :bytes, in_flight: :count, round_trip: :ns],
        process,
        []
      ) ++
      one.(
        [:bridge, :pool, :route],
        :host,
        "A command gets its place in a kernel.",
        [system_time: {:maybe, :epoch_ns}, queue: :ns, candidates: :count, expected: :ns],
        kernel ++ [strategy: :string, subject: :string] ++ session ++ maybe.(trace),
        []
      ) ++
      one.(
        [:bridge, :pool, :queue, :reject],
        :host,
        "The queue is full: a command is refused.",
        [waiting: :count, session_waiting: :count],
        session ++ [subject: :string],
        []
      ) ++
      Enum.flat_map([open: "A command that keeps failing is held back.", close: "It may run again."], fn {state, says} ->
        one.(
          [:bridge, :pool, :breaker, state],
          :host,
          says,
          [failures: :count, cooldown: :ns],
          [subject: :string] ++ kernel ++ reason,
          []
        )
      end) ++
      one.(
        [:bridge, :pool, :recycle],
        :host,
        "A kernel is going to be replaced although it lives.",
        [completed: :count, age: :ns, rss: :bytes],
        process ++ reason,
        []
      ) ++
      one.(
        [:bridge, :pool, :scale],
        :host,
        "The number of kernels changes.",
        [before: :count, wanted: :count],
        reason,
        []
      ) ++
      one.(
        [:bridge, :pool, :sweep],
        :host,
        "Kernels that a dead host had left behind were killed.",
        [killed: :count],
        [host: :integer] ++ reason,
        []
      ) ++
      one.(
        [:bridge, :journal, :replay],
        :host,
        "The journal answers a callback of a command that runs again.",
        [n: :count],
        [method: :string, about: :string] ++ session ++ [command_id: :string],
        []
      ) ++
      one.(
        [:bridge, :cache, :hit],
        :host,
        "A result is given from the cache: no kernel runs.",
        [saved: :ns, age: :ns],
        cached,
        []
      ) ++
      one.([:bridge, :cache, :miss], :host, "The cache has no result.", [], cached, []) ++
      one.([:bridge, :cache, :store], :host, "A result is kept in the cache.", [bytes: :bytes, saved: :ns], cached, []) ++
      one.([:bridge, :cache, :skip], :host, "A result is not kept, although asked for.", [], cached ++ reason, []) ++
      one.(
        [:bridge, :telemetry, :drop],
        :host,
        "A command emitted more events at once than are kept.",
        [events: :count],
        run,
        []
      ) ++
      one.(
        [:bridge, :telemetry, :detach],
        :host,
        "A handler raised, and is not called any more.",
        [],
        [handler: :string, error: :string],
        []
      )

  measured = fn
    {name, {:maybe, unit}} -> {name, %{unit: unit, optional: true}}
    {name, unit} -> {name, %{unit: unit, optional: false}}
  end

  said = fn
    {name, {:maybe, {:null, kind}}} -> {name, %{kind: kind, optional: true, nullable: true}}
    {name, {:maybe, kind}} -> {name, %{kind: kind, optional: true, nullable: false}}
    {name, {:null, kind}} -> {name, %{kind: kind, optional: false, nullable: true}}
    {name, kind} -> {name, %{kind: kind, optional: false, nullable: false}}
  end

  # An optional member that may be nil too, as parent_span_id of a tool: {:maybe, {:null, …}} by `maybe`.
  events =
    for event <- all do
      %{event | measurements: Map.new(event.measurements, measured), metadata: Map.new(event.metadata, said)}
    end

  @events events
  @names Enum.map(events, & &1.name) -- [[:bridge, :user, :*]]
  @by_name Map.new(events, &{&1.name, &1})

  # For each that a kernel may emit, by the name that it has on the wire: its name here, and its members' names by
  # theirs. Of an open one only what Bridge itself says has a place among the atoms: the rest is the user's.
  on_wire = fn event ->
    wired = fn members -> for {name, one} <- members, do: {Atom.to_string(name), name, one} end
    %{name: event.name, open: event.open, numbers: wired.(event.measurements), said: wired.(event.metadata)}
  end

  @from_kernel (for event <- events, event.by != :host, event.name != [:bridge, :user, :*], into: %{} do
                  {Enum.map(event.name, &Atom.to_string/1), on_wire.(event)}
                end)
  @user on_wire.(%{name: [:bridge, :user], open: true, measurements: %{}, metadata: Map.new(maybe.(run), said)})

  @doc """
  Every event. `[:bridge, :user, :*]` stands for the user's own, which are `[:bridge, :user]` here, with their name in the
  metadata: a name that comes from outside makes no atom.
  """
  @spec events() :: [event()]
  def events, do: @events

  @doc "What the catalogue says of an event; nil if it does not know it."
  @spec event([atom()]) :: event() | nil
  def event([:bridge, :user | _]), do: @by_name[[:bridge, :user, :*]]
  def event(name), do: @by_name[name]

  @doc """
  The names of all events that begin so, the user's own among them; a name of another's is itself.

      iex> Bridge.Telemetry.Catalogue.matching([:bridge, :session])
      [[:bridge, :session, :start], [:bridge, :session, :stop]]
  """
  @spec matching([atom()]) :: [[atom()]]
  def matching(prefix) do
    case Enum.filter(@names ++ [[:bridge, :user]], &List.starts_with?(&1, prefix)) do
      [] -> [prefix]
      found -> found
    end
  end

  @doc "In what an event of the host's is not as the catalogue says; nil if it is."
  @spec problem([atom()], map(), map()) :: String.t() | nil
  def problem(name, measurements, metadata) do
    case event(name) do
      nil ->
        "#{inspect(name)} is not in the catalogue"

      event ->
        members(event, :measurement, measurements) || members(event, :metadata, metadata) || kinds(event, metadata)
    end
  end

  defp members(event, what, given) do
    expected = if what == :measurement, do: event.measurements, else: event.metadata
    missing = for {name, one} <- expected, not one.optional, not is_map_key(given, name), do: name
    # Every event says of which bridge it is: in one BEAM there may be several.
    more =
      if event.open, do: [], else: for({name, _} <- given, not is_map_key(expected, name), name != :bridge, do: name)

    if missing != [] or more != [],
      do: "#{inspect(event.name)}: #{what} #{inspect(missing)} missing, #{inspect(more)} not in the catalogue"
  end

  defp kinds(event, metadata) do
    wrong = for {name, value} <- metadata, one = event.metadata[name], not kind?(one, value), do: name
    if wrong != [], do: "#{inspect(event.name)}: metadata #{inspect(wrong)} is of another kind"
  end

  defp kind?(%{nullable: true}, nil), do: true
  defp kind?(%{kind: :string}, value), do: is_binary(value)
  defp kind?(%{kind: :integer}, value), do: is_integer(value)
  defp kind?(%{kind: :boolean}, value), do: is_boolean(value)

  @doc """
  An event as a kernel, which may be anybody's, tells it: with atoms for what the catalogue knows, durations in native
  units; `:unknown` if it knows no such event; `:refused` if no kernel can have measured this.
  """
  @spec from_kernel([String.t()], map(), map()) :: {:ok, [atom()], map(), map()} | :unknown | :refused
  def from_kernel(["bridge", "user", name], measurements, metadata)
      when is_binary(name) and byte_size(name) <= @max_text do
    with {:ok, event, measurements, metadata} <- convert(@user, measurements, metadata) do
      {:ok, event, measurements, Map.put(metadata, :name, :binary.copy(name))}
    end
  end

  def from_kernel(["bridge", "user", _no_name], _measurements, _metadata), do: :refused

  def from_kernel(name, measurements, metadata) do
    case @from_kernel do
      %{^name => event} -> convert(event, measurements, metadata)
      _other -> if host?(name), do: :refused, else: :unknown
    end
  end

  @host for event <- events, event.by == :host, into: MapSet.new(), do: Enum.map(event.name, &Atom.to_string/1)
  defp host?(name), do: MapSet.member?(@host, name)

  defp convert(event, measurements, metadata) do
    with {:ok, numbers} <- numbers(event.numbers, measurements),
         {:ok, said} <- said(event.said, metadata) do
      more = if event.open, do: rest(event, measurements, metadata), else: {%{}, %{}}
      {:ok, event.name, Map.merge(elem(more, 0), numbers), Map.merge(elem(more, 1), said)}
    end
  end

  defp numbers(expected, given) do
    take(expected, given, fn one, value ->
      least = if one.unit == :one, do: -@max_number, else: 0
      if is_number(value) and value >= least and value <= @max_number, do: {:ok, native(one.unit, value)}, else: :error
    end)
  end

  defp said(expected, given) do
    take(expected, given, fn one, value ->
      if kind?(one, value) and bounded?(value), do: {:ok, copied(value)}, else: :error
    end)
  end

  defp take(expected, given, fun) do
    Enum.reduce_while(expected, {:ok, %{}}, fn {wire, name, one}, {:ok, taken} ->
      taken(fun, name, one, Map.fetch(given, wire), taken)
    end)
  end

  defp taken(_fun, _name, one, :error, taken), do: if(one.optional, do: {:cont, {:ok, taken}}, else: {:halt, :refused})

  defp taken(fun, name, one, {:ok, value}, taken) do
    case fun.(one, value) do
      {:ok, value} -> {:cont, {:ok, Map.put(taken, name, value)}}
      :error -> {:halt, :refused}
    end
  end

  defp rest(event, measurements, metadata) do
    known = fn members -> Enum.map(members, &elem(&1, 0)) end
    numbers = for {name, n} <- Map.drop(measurements, known.(event.numbers)), own_number?(n), do: {name, n}

    said =
      for {name, value} <- Map.drop(metadata, known.(event.said)),
          is_binary(value) or own_number?(value) or is_boolean(value) or is_nil(value),
          do: {name, value}

    {numbers, left} = within(numbers, @max_own_bytes)
    {said, _left} = within(said, left)
    {numbers, said}
  end

  # What would be larger than 64 bits is nobody's measurement, and takes as much room as it likes.
  defp own_number?(n), do: is_float(n) or (is_integer(n) and abs(n) <= @max_number)

  defp within(members, left) do
    Enum.reduce(members, {%{}, left}, fn {name, value}, {kept, left} ->
      size = byte_size(name) + if(is_binary(value), do: byte_size(value), else: 8)

      if size <= left and bounded?(name) and bounded?(value),
        do: {Map.put(kept, copied(name), copied(value)), left - size},
        else: {kept, left}
    end)
  end

  defp bounded?(value), do: not is_binary(value) or byte_size(value) <= @max_text

  # A part of a message would keep the whole message in memory for as long as the event is remembered.
  defp copied(text) when is_binary(text), do: :binary.copy(text)
  defp copied(other), do: other

  defp native(unit, value) when unit in [:ns, :epoch_ns] and is_integer(value) do
    System.convert_time_unit(value, :nanosecond, :native)
  end

  defp native(unit, value) when unit in [:ns, :epoch_ns], do: native(unit, trunc(value))
  defp native(_unit, value), do: value
end
