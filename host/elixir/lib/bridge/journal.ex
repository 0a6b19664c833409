defmodule Bridge.Journal do
  @moduledoc false
  # What one command has called back and was answered, so that it may run again without its tools doing so. Pure: it knows
  # neither kernels nor tools. A callback of the command's own flow is found again by its place in it (`seq`), one from
  # another thread or task by what it asks.

  alias Bridge.{Error, JSON}

  defmodule Entry do
    @moduledoc false
    # One callback. `reply` is nil while its tool runs, or for ever if the host died meanwhile (`lost`); `versions` are
    # those of the variables it read, if that is all that is known.

    @derive {Inspect, only: [:n, :seq, :method]}
    @enforce_keys [:n, :seq, :method, :asked, :buffers, :effect, :digest, :sealed?]
    defstruct @enforce_keys ++ [:reply, :versions, lost: false, waiting: []]

    @type t :: %__MODULE__{}
  end

  @max_callbacks 100_000
  @shown 300

  @derive {Inspect, only: [:next, :replaying]}
  defstruct entries: %{},
            next: 1,
            own: %{},
            free: %{},
            readings: %{},
            replaying: false,
            overflowed: false,
            effects: false,
            sealed?: false

  @type t :: %__MODULE__{}

  @doc "Of a command that has called back `entries` already, and is `sealed?` if it has secrets."
  @spec new([Entry.t()], boolean()) :: t()
  def new(entries, sealed?) do
    %__MODULE__{
      sealed?: sealed?,
      entries: Map.new(entries, &{&1.n, &1}),
      next: entries |> Enum.map(& &1.n) |> Enum.max(fn -> 0 end) |> Kernel.+(1),
      effects: Enum.any?(entries, & &1.effect)
    }
  end

  @doc "What a callback asks, without who asks and when."
  @spec asked(String.t(), map()) :: term()
  def asked("tool.call", params), do: [params["name"], params["args"] || [], params["kwargs"] || %{}]
  def asked("session.get", params), do: [params["name"]]
  def asked("session.get_many", params), do: params["names"]
  def asked("instance.fetch", params), do: [params["ref"]]
  def asked(_method, _params), do: []

  @doc "The same for two callbacks that ask the same."
  @spec digest(String.t(), term(), [binary()]) :: binary()
  def digest(method, asked, buffers) do
    sized = for buffer <- buffers, do: [<<byte_size(buffer)::64>>, buffer]
    :crypto.hash(:sha256, [JSON.canonical([method, asked]) | sized])
  end

  @doc "A callback as an error shows it. Of a command that has secrets no argument is shown."
  @spec shown(Entry.t()) :: String.t()
  def shown(entry), do: shown(entry.method, entry.asked, entry.sealed?)

  defp shown("tool.call", [name | _arguments], true), do: "tool #{name}(…)"

  defp shown("tool.call", [name, args, kwargs], false) do
    given = Enum.map(args, &JSON.canonical/1) ++ for {key, value} <- kwargs, do: "#{key}=#{JSON.canonical(value)}"
    clip("tool #{name}(#{Enum.join(given, ", ")})")
  end

  defp shown(method, asked, _sealed?), do: clip("#{method}(#{Enum.join(asked, ", ")})")

  defp clip(text), do: if(String.length(text) > @shown, do: String.slice(text, 0, @shown) <> "…", else: text)

  @spec count(t()) :: non_neg_integer()
  def count(journal), do: map_size(journal.entries)

  @doc "All that is recorded, in order."
  @spec entries(t()) :: [Entry.t()]
  def entries(journal), do: journal.entries |> Map.values() |> Enum.sort_by(& &1.n)

  @spec fetch!(t(), pos_integer()) :: Entry.t()
  def fetch!(journal, n), do: Map.fetch!(journal.entries, n)

  @doc "Puts an entry back that has changed. One that was forgotten meanwhile stays so."
  @spec put(t(), Entry.t()) :: t()
  def put(journal, entry) do
    if is_map_key(journal.entries, entry.n), do: put_in(journal.entries[entry.n], entry), else: journal
  end

  @doc "Forgets these."
  @spec drop(t(), [pos_integer()]) :: t()
  def drop(journal, numbers), do: %{journal | entries: Map.drop(journal.entries, numbers)}

  @doc "A new attempt: everything recorded is to be asked for again."
  @spec begin(t()) :: t()
  def begin(%{entries: entries} = journal) when map_size(entries) == 0, do: journal

  def begin(journal) do
    {own, free} = journal |> entries() |> Enum.split_with(& &1.seq)

    %{
      journal
      | own: Map.new(own, &{&1.seq, &1.n}),
        free: free |> Enum.map(&{&1.digest, &1.n}) |> Enum.group_by(&elem(&1, 0), &elem(&1, 1)),
        replaying: true
    }
  end

  @doc """
  The recorded callback that this one repeats, nil if it is new. Third, those that are forgotten now, because the command
  took another way where that did no harm.

  `:replay_diverged` if it takes another way although a tool's effect has happened on the first.
  """
  @spec match(t(), integer() | nil, String.t(), term(), binary()) ::
          {:ok, t(), Entry.t() | nil, [pos_integer()]} | {:error, Error.t()}
  def match(journal, nil, _method, _asked, digest) do
    case journal.free do
      %{^digest => [n | rest]} ->
        free = if rest == [], do: Map.delete(journal.free, digest), else: %{journal.free | digest => rest}
        {:ok, settle(%{journal | free: free}), fetch!(journal, n), []}

      %{} ->
        {:ok, journal, nil, []}
    end
  end

  def match(journal, seq, method, asked, digest) do
    {n, own} = Map.pop(journal.own, seq)
    entry = n && fetch!(journal, n)

    cond do
      # A reading that was not recorded: by itself it does no harm.
      entry == nil and method != "tool.call" -> {:ok, journal, nil, []}
      entry != nil and entry.digest == digest -> {:ok, settle(%{journal | own: own}), entry, []}
      true -> another_way(%{journal | own: own}, entry, seq, method, asked)
    end
  end

  defp settle(journal), do: %{journal | replaying: journal.own != %{} or journal.free != %{}}

  # Those behind were passed over without being asked for: a tool must not run before that is noticed.
  defp another_way(journal, entry, seq, method, asked) do
    left =
      journal.own
      |> Map.values()
      |> Enum.map(&fetch!(journal, &1))
      |> Enum.concat(List.wrap(entry))
      |> Enum.sort_by(& &1.n)

    case Enum.find(left, &(&1.effect and (&1.seq >= seq or method == "tool.call"))) do
      nil ->
        ahead = Enum.filter(left, &(&1.seq >= seq))
        numbers = Enum.map(ahead, & &1.n)
        own = Map.drop(journal.own, Enum.map(ahead, & &1.seq))
        {:ok, drop(%{journal | own: own}, numbers), nil, numbers}

      effect ->
        Error.error(
          :replay_diverged,
          "the first time, callback #{effect.seq} of the command was #{shown(effect)}; when it ran " <>
            "again, callback #{seq} was #{shown(method, asked, journal.sealed?)}"
        )
    end
  end

  @doc "A new callback."
  @spec record(t(), integer() | nil, String.t(), term(), [binary()], boolean()) :: {t(), Entry.t()}
  def record(journal, seq, method, asked, buffers, effect) do
    entry = %Entry{
      n: journal.next,
      seq: seq,
      method: method,
      asked: asked,
      buffers: buffers,
      effect: effect,
      digest: digest(method, asked, buffers),
      sealed?: journal.sealed?
    }

    journal = %{journal | next: journal.next + 1, effects: journal.effects or effect}

    if count(journal) < @max_callbacks,
      do: {put_in(journal.entries[entry.n], entry), entry},
      else: {%{journal | overflowed: true}, entry}
  end

  @doc "A reading's reply, which is the earlier one if it says the same: who reads in a loop keeps one of it."
  @spec once(t(), binary(), term()) :: {t(), term()}
  def once(journal, digest, reply) do
    case journal.readings do
      %{^digest => ^reply = same} -> {journal, same}
      %{} when map_size(journal.readings) >= @max_callbacks -> {journal, reply}
      %{} -> {put_in(journal.readings[digest], reply), reply}
    end
  end

  @doc "`:replay_diverged` if a tool's effect has happened that the attempt which succeeded did not ask for."
  @spec check_complete(t()) :: :ok | {:error, Error.t()}
  def check_complete(%{replaying: false}), do: :ok

  def check_complete(journal) do
    left = Map.values(journal.own) ++ Enum.concat(Map.values(journal.free))

    case left |> Enum.map(&fetch!(journal, &1)) |> Enum.find(& &1.effect) do
      nil ->
        :ok

      effect ->
        Error.error(
          :replay_diverged,
          "the first time, the command called #{shown(effect)}; when it ran again, it ended " <>
            "without calling that"
        )
    end
  end
end
