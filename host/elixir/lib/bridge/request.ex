defmodule Bridge.Request do
  @moduledoc false
  # What is asked of a kernel, as data: enough to run a command once more, on another kernel or in another life. `prepare`
  # looks up, once, what it needs of its session, so that every attempt is the same command.

  alias Bridge.{Config, Error, JSON, Secrets, SessionStore, Value}

  # `body` and `secrets` are in functions: no crash report shows what a closure holds.
  @derive {Inspect, only: [:method, :subject]}
  @enforce_keys [:request, :method, :subject, :body, :identity]
  defstruct @enforce_keys ++ [buffers: [], secrets: nil, source: nil, instance: nil, secret?: false]

  @type request ::
          {:call | :stream, name :: String.t(), args :: list(), kwargs :: map(), secrets :: [String.t()]}
          | {:create, ref :: String.t(), class :: String.t(), list(), map(), [String.t()], name :: String.t()}
          | {:method, ref :: String.t(), method :: String.t(), list(), map(), [String.t()]}
          | {:inspect, {:path, String.t()} | {:ref, String.t()}}
  @type t :: %__MODULE__{}

  @credit 16

  @doc "How many chunks a stream may be ahead of its reader."
  @spec credit() :: pos_integer()
  def credit, do: @credit

  @spec prepare(Config.t(), String.t(), request()) :: {:ok, t()} | {:error, Error.t()}
  def prepare(cfg, session, request) do
    with :ok <- texts(request), do: prepare_checked(cfg, session, request)
  end

  # Names travel as they are; what a value may be is looked at when it is encoded.
  defp texts(request) do
    names = for part <- Tuple.to_list(request), name <- names(part), do: name

    case Enum.reject(names, &String.valid?/1) do
      [] -> :ok
      [name | _] -> Error.error(:invalid_params, "#{inspect(name, printable_limit: 80)} is no name: it is no UTF-8")
    end
  end

  defp names(name) when is_binary(name), do: [name]
  defp names(%{} = kwargs), do: Map.keys(kwargs)
  defp names({_kind, name}), do: [name]
  defp names(_part), do: []

  defp prepare_checked(cfg, session, {kind, name, args, kwargs, wanted} = request) when kind in [:call, :stream] do
    source = with {:ok, known} <- SessionStore.function(cfg, session, name), do: known
    own = if source == :error, do: [], else: source.secrets
    lm? = String.starts_with?(name, "dspy.") or (source != :error and source.lm)

    with {:ok, secrets} <- Secrets.for_command(cfg, session, own ++ wanted),
         {:ok, lm} <- lm(cfg, session, lm?),
         {:ok, given, trees, buffers} <- arguments(args, kwargs) do
      function =
        case source do
          :error -> [JSON.encode!(%{"kind" => "path", "path" => name})]
          source -> source_function(source)
        end

      method = if kind == :call, do: "function.call", else: "function.stream"
      credit = if kind == :stream, do: [~s(,"credit":), Integer.to_string(@credit)], else: []
      body = [~s("function":)] ++ function ++ [?,, given, ~s(,"lm":), JSON.encode!(lm), credit]

      {:ok,
       %__MODULE__{
         request: request,
         method: method,
         subject: name,
         body: fn -> body end,
         buffers: buffers,
         secrets: fn -> secrets end,
         source: if(source != :error, do: source.hash),
         secret?: secrets != %{} or has_key?(lm),
         identity: {[method, name, if(source != :error, do: source.hash, else: ""), Enum.sort(wanted) | trees], buffers}
       }}
    end
  end

  defp prepare_checked(cfg, session, {:create, ref, class, args, kwargs, wanted, name} = request) do
    with {:ok, secrets} <- Secrets.for_command(cfg, session, wanted),
         {:ok, given, trees, buffers} <- arguments(args, kwargs) do
      named = JSON.encode!(%{"ref" => ref, "class" => class})
      record = %{ref: ref, class: class, args: args, kwargs: kwargs, name: name, version: 0}

      {:ok,
       %__MODULE__{
         request: request,
         method: "instance.create",
         subject: class <> "()",
         body: fn -> [~s("record":), open(named), ?,, given, ?}] end,
         buffers: buffers,
         secrets: fn -> secrets end,
         instance: record,
         secret?: secrets != %{},
         identity: {["instance.create", class, name, Enum.sort(wanted) | trees], buffers}
       }}
    end
  end

  defp prepare_checked(cfg, session, {:method, ref, method, args, kwargs, wanted} = request) do
    with {:ok, record} <- instance(cfg, session, ref),
         {:ok, secrets} <- Secrets.for_command(cfg, session, wanted),
         {:ok, lm} <- lm(cfg, session, record.state != nil and record.state.adapter == "dspy"),
         {:ok, given, trees, buffers} <- arguments(args, kwargs),
         {:ok, written, more} <- record(record, length(buffers)) do
      body = [
        ~s("record":),
        JSON.encode!(written),
        ~s(,"method":),
        JSON.encode!(method),
        ?,,
        given,
        ~s(,"lm":),
        JSON.encode!(lm)
      ]

      {:ok,
       %__MODULE__{
         request: request,
         method: "instance.call",
         subject: "#{record.class}.#{method}",
         body: fn -> body end,
         buffers: buffers ++ more,
         secrets: fn -> secrets end,
         instance: record,
         secret?: secrets != %{} or has_key?(lm),
         identity: {["instance.call", record.ref, method, Enum.sort(wanted) | trees], buffers}
       }}
    end
  end

  defp prepare_checked(cfg, session, {:inspect, target} = request) do
    with {:ok, body, buffers} <- inspected(cfg, session, target) do
      {:ok,
       %__MODULE__{
         request: request,
         method: "object.inspect",
         subject: "object.inspect",
         body: fn -> body end,
         buffers: buffers,
         secrets: fn -> %{} end,
         identity: {["object.inspect" | target |> Tuple.to_list() |> Enum.map(&to_string/1)], []}
       }}
    end
  end

  defp inspected(cfg, session, {:ref, ref}) do
    with {:ok, record} <- instance(cfg, session, ref), {:ok, written, buffers} <- record(record, 0) do
      {:ok, [~s("record":), JSON.encode!(written)], buffers}
    end
  end

  defp inspected(cfg, session, {:path, path}) do
    case SessionStore.function(cfg, session, path) do
      {:ok, source} ->
        {:ok, [~s("function":), JSON.encode!(source_map(source, source.source))], []}

      :error ->
        {:ok, [~s("path":), JSON.encode!(path)], []}
    end
  end

  defp source_map(source, text),
    do: %{"kind" => "source", "name" => source.name, "hash" => source.hash, "source" => text}

  # The kernel's process leaves the text out where the kernel has it.
  defp source_function(source) do
    [
      open(JSON.encode!(Map.delete(source_map(source, nil), "source"))),
      ~s(,"source":),
      {:source, source.hash, JSON.encode!(source.source)},
      ?}
    ]
  end

  # An encoded object without its last brace: more members follow.
  defp open(json) do
    text = IO.iodata_to_binary(json)
    binary_part(text, 0, byte_size(text) - 1)
  end

  @doc "The instance of that ref or name; `:not_found` names those there are."
  @spec instance(Config.t(), String.t(), String.t()) :: {:ok, map()} | {:error, Error.t()}
  def instance(cfg, session, ref) do
    with :error <- SessionStore.instance(cfg, session, ref) do
      there =
        cfg
        |> SessionStore.instances(session)
        |> Enum.map_join(", ", &if(&1.name in [nil, ""], do: &1.ref, else: &1.name))

      Error.error(:not_found, "session #{inspect(session)} has no instance #{inspect(ref)}",
        remedy: "There #{if there == "", do: "is none", else: "is #{there}"}."
      )
    end
  end

  @doc "An instance as a kernel is told of it; its buffers are numbered from `first` on."
  @spec record(map(), non_neg_integer()) :: {:ok, map(), [binary()]} | {:error, Error.t()}
  def record(record, first) do
    state = record.state || %{adapter: "recipe", value: nil, sha256: ""}
    args = for {value, i} <- Enum.with_index(record.args), do: {"args[#{i}]", value}
    kwargs = Enum.to_list(record.kwargs)

    with {:ok, trees, buffers} <- Value.encode_many(args ++ kwargs ++ [{"state", state.value}], first: first) do
      {args, rest} = Enum.split(trees, length(args))
      {kwargs_trees, [value]} = Enum.split(rest, length(kwargs))

      {:ok,
       %{
         "ref" => record.ref,
         "class" => record.class,
         "args" => args,
         "kwargs" => kwargs |> Enum.map(&elem(&1, 0)) |> Enum.zip(kwargs_trees) |> Map.new(),
         "state" => %{"adapter" => state.adapter, "value" => value, "sha256" => state.sha256 || ""},
         "version" => record.version
       }, buffers}
    end
  end

  defp arguments(args, kwargs) do
    placed = for {value, i} <- Enum.with_index(args), do: {"args[#{i}]", value}
    named = Enum.to_list(kwargs)

    with {:ok, trees, buffers} <- Value.encode_many(placed ++ named) do
      {args, values} = Enum.split(trees, length(placed))
      kwargs = named |> Enum.map(&elem(&1, 0)) |> Enum.zip(values) |> Map.new()
      {:ok, [~s("args":), JSON.encode!(args), ~s(,"kwargs":), JSON.encode!(kwargs)], [args, kwargs], buffers}
    end
  end

  @doc "The session's language model, with its key, for commands that need it."
  @spec lm(Config.t(), String.t(), boolean()) :: {:ok, map() | nil} | {:error, Error.t()}
  def lm(_cfg, _session, false), do: {:ok, nil}

  def lm(cfg, session, true) do
    case SessionStore.lm(cfg, session) do
      nil ->
        {:ok, nil}

      lm ->
        with {:ok, key} <- Secrets.lm_key(cfg, session),
             {:ok, options, []} <- Value.encode(lm.options || %{}, "options") do
          {:ok,
           %{
             "model" => lm.model,
             "api_base" => lm.api_base,
             "api_key" => key,
             "adapter" => lm.adapter,
             "options" => options
           }}
        end
    end
  end

  defp has_key?(lm), do: is_map(lm) and lm["api_key"] != nil

  @doc "The same for two commands that ask the same; the order in which a map was written does not count."
  @spec digest(t()) :: binary()
  def digest(%__MODULE__{identity: {what, buffers}}) do
    sized = for buffer <- buffers, do: [<<byte_size(buffer)::64>>, buffer]
    :crypto.hash(:sha256, [JSON.canonical(what) | sized])
  end

  @doc "The parameters of one attempt, in which the kernel's process puts the source."
  @spec params(t(), String.t(), map()) :: list()
  def params(prepared, session, attempt) do
    common =
      open(
        JSON.encode!(%{
          "session" => session,
          "deadline" => attempt.deadline,
          "attempt" => attempt.attempt,
          "traceparent" => attempt.traceparent,
          "secrets" => prepared.secrets.(),
          "telemetry" => attempt.telemetry
        })
      )

    [common, ?, | prepared.body.()] ++ [?}]
  end
end
