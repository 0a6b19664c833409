defmodule Bridge.Tools do
  @moduledoc """
  The tools of sessions: Elixir functions that kernels call back, with a schema of their arguments.

      Bridge.Tools.register("demo", "double", fn %{"x" => x} -> 2 * x end,
        schema: %{type: "object", properties: %{x: %{type: "integer"}}, required: ["x"]}
      )

  In Python, `ctx.call_tool("double", x=21)` is then `42`; a tool that is passed as an argument (`tool/3`) arrives there
  as a Python function.

  What the function is given:

  - With `args: [:a, :b]` it takes these in this order, whether they were given by place or by name. A function of one
    argument that names several takes them as one map.
  - A function of one argument without `args:` takes one map of all arguments, with strings for keys, so that it can
    match on them: `fn %{"answer" => answer} -> … end`. A single argument that is given by place, and is no map, comes
    as the one member that the schema has, or as it is where the schema names none or several.
  - A function of more arguments without `args:` takes the schema's `required` as their order; without a schema its
    arguments are given by place only.

  Arguments are checked against the schema before the function runs. Tools are read from ETS by whoever asks. They live
  as long as their session, or their bridge, and are in no store: a function cannot be written down.
  """

  use GenServer

  alias Bridge.{Config, Error, Result, Schema}
  alias Bridge.Tools.Registered

  @max_tools 1_000
  @max_name 200
  @max_arity 8

  @type session :: String.t() | struct()

  # -- the table's owner ---------------------------------------------------------------

  @doc false
  @spec start_link(struct()) :: GenServer.on_start()
  def start_link(cfg) do
    # The process has the table's name: neither is ever there without the other.
    GenServer.start_link(__MODULE__, cfg, name: Config.process(cfg.name, :tools))
  end

  @doc false
  @spec child_spec(struct()) :: Supervisor.child_spec()
  def child_spec(cfg), do: %{id: __MODULE__, start: {__MODULE__, :start_link, [cfg]}}

  @impl true
  def init(cfg) do
    # Public, for a tool is registered by whoever has it: the owner has nothing to add.
    options = [:named_table, :ordered_set, :public, read_concurrency: true]
    {:ok, :ets.new(Config.process(cfg.name, :tools), options)}
  end

  # -- for people ----------------------------------------------------------------------

  @doc """
  Registers a function as a tool of the session, in place of one that has this name.

  Options: `schema:` a JSON Schema of the arguments, with atoms or strings for keys; `args:` the arguments' names in
  order; `description:` what it does, for those who choose among tools (language models among them); `idempotent: true`
  if running it twice does no harm; `timeout:` for how long it may run, in milliseconds; `bridge:` which bridge.
  """
  @spec register(session(), String.t(), fun(), keyword()) :: :ok | {:error, Error.t()}
  def register(session, name, fun, opts \\ []) when is_function(fun) do
    with {:ok, table, session} <- locate(session, opts),
         {:ok, tool} <- describe(session, name, fun, opts),
         :ok <- room(table, session, tool.name) do
      :ets.insert(table, {{session, tool.name}, tool, System.unique_integer([:monotonic])})
      :ok
    end
  end

  @doc "As `register/4`; raises the error."
  @spec register!(session(), String.t(), fun(), keyword()) :: :ok
  def register!(session, name, fun, opts \\ []), do: Result.bang(register(session, name, fun, opts))

  @doc "Forgets a tool of the session."
  @spec unregister(session(), String.t(), keyword()) :: :ok | {:error, Error.t()}
  def unregister(session, name, opts \\ []) do
    with {:ok, table, session} <- locate(session, opts) do
      case :ets.take(table, {session, name}) do
        [] -> not_found(session, name)
        [_tool] -> :ok
      end
    end
  end

  @doc "The tools of the session, by name."
  @spec list(session(), keyword()) :: {:ok, [Registered.t()]} | {:error, Error.t()}
  def list(session, opts \\ []) do
    with {:ok, table, session} <- locate(session, opts) do
      {:ok, :ets.select(table, [{{{session, :_}, :"$1", :_}, [], [:"$1"]}])}
    end
  end

  @doc "As `list/2`; raises the error."
  @spec list!(session(), keyword()) :: [Registered.t()]
  def list!(session, opts \\ []), do: Result.bang(list(session, opts))

  @doc "The tool of that name."
  @spec fetch(session(), String.t(), keyword()) :: {:ok, Registered.t()} | {:error, Error.t()}
  def fetch(session, name, opts \\ []) do
    with {:ok, table, session} <- locate(session, opts) do
      case :ets.lookup(table, {session, name}) do
        [{_key, tool, _at}] -> {:ok, tool}
        [] -> not_found(session, name)
      end
    end
  end

  @doc "What to pass as an argument, so that Python code has the tool as a function."
  @spec tool(session(), String.t(), keyword()) :: {:ok, struct()} | {:error, Error.t()}
  def tool(session, name, opts \\ []) do
    with {:ok, tool} <- fetch(session, name, opts) do
      {:ok, struct!(Bridge.Tool, name: tool.name, description: tool.description, schema: tool.schema)}
    end
  end

  @doc "As `tool/3`; raises the error."
  @spec tool!(session(), String.t(), keyword()) :: struct()
  def tool!(session, name, opts \\ []), do: Result.bang(tool(session, name, opts))

  @doc "Forgets the tools that a session had when it went: those that were registered since are another's."
  @spec forget(session(), integer(), keyword()) :: :ok
  def forget(session, at \\ System.unique_integer([:monotonic]), opts) do
    with {:ok, table, session} <- locate(session, opts) do
      :ets.select_delete(table, [{{{session, :_}, :_, :"$1"}, [{:<, :"$1", at}], [true]}])
    end

    :ok
  end

  # -- for the engine --------------------------------------------------------------------

  @doc """
  The arguments as the tool's function takes them, from those that a kernel gave by place and by name.

      iex> {:ok, tool} = Bridge.Tools.Registered.new("s", "minus", &Kernel.-/2, args: [:a, :b])
      iex> Bridge.Tools.arguments(tool, [5], %{"b" => 3})
      {:ok, [5, 3]}
      iex> {:error, error} = Bridge.Tools.arguments(tool, [5], %{"c" => 3})
      iex> error.message
      ~s(tool "minus": b: is missing; c: there is no such argument)
  """
  @spec arguments(Registered.t(), [term()], %{optional(String.t()) => term()}) ::
          {:ok, [term()]} | {:error, Error.t()}
  def arguments(%Registered{} = tool, args, kwargs) do
    with {:ok, given} <- given(tool, args, kwargs),
         :ok <- complete(tool, given),
         :ok <- valid(tool, given) do
      {:ok, ordered(tool, given)}
    end
  end

  @doc """
  Runs the tool's function. Whatever it raises goes through, with one exception: if none of its own clauses matches, it
  is an error of the tool that says which one it was.
  """
  @spec invoke(Registered.t(), [term()]) :: term()
  def invoke(%Registered{fun: fun} = tool, args) do
    apply(fun, args)
  rescue
    error in FunctionClauseError ->
      if own?(fun, args, error, __STACKTRACE__),
        do: reraise(no_clause(tool, args), __STACKTRACE__),
        else: reraise(error, __STACKTRACE__)
  end

  # -- where -----------------------------------------------------------------------------

  defp locate(session, opts) do
    with {:ok, bridge, id} when is_binary(id) <- Bridge.Session.whose(session, opts) do
      table = Config.process(bridge, :tools)

      if :ets.whereis(table) == :undefined,
        do: Error.error(:host_closed, "#{inspect(bridge)} is not running"),
        else: {:ok, table, id}
    else
      {:ok, _bridge, other} -> refused("a session is its id, a text, not #{inspect(other, limit: 3)}")
      {:error, error} -> {:error, error}
    end
  end

  defp room(table, session, name) do
    count = :ets.select_count(table, [{{{session, :_}, :_, :_}, [], [true]}])

    if count < @max_tools or :ets.member(table, {session, name}) do
      :ok
    else
      Error.error(:quota_exceeded, "session #{inspect(session)} has #{@max_tools} tools",
        remedy: "Unregister some: Bridge.Tools.unregister(session, name)."
      )
    end
  end

  defp not_found(session, name) do
    Error.error(:not_found, "session #{inspect(session)} has no tool #{inspect(name)}",
      remedy: "Look at what there is: Bridge.Tools.list(session)."
    )
  end

  # -- what a tool is --------------------------------------------------------------------

  defp describe(session, name, fun, opts) do
    {:arity, arity} = Function.info(fun, :arity)

    cond do
      not (is_binary(name) and String.valid?(name) and name != "" and byte_size(name) <= @max_name) ->
        refused("a tool's name is a text of 1 to #{@max_name} bytes, not #{inspect(name)}")

      arity > @max_arity ->
        refused("tool #{inspect(name)}: a function of #{arity} arguments is too wide: #{@max_arity} at most",
          remedy: "Let it take one map."
        )

      true ->
        Registered.new(session, name, fun, opts)
    end
  end

  defp refused(message, opts \\ []), do: Error.error(:invalid_arguments, message, opts)

  # -- arguments ---------------------------------------------------------------------------

  # `{:named, map}`: all have names; `{:placed, list}`: they have none; `{:whole, value}`: one value, as it is.
  defp given(%Registered{takes: :map, closed: false} = tool, [value], kwargs) when map_size(kwargs) == 0 do
    case {fields(value), tool.args} do
      {{:ok, %{} = fields}, [only]} when not is_map_key(fields, only) -> {:ok, {:named, %{only => value}}}
      {{:ok, %{} = fields}, _args} -> {:ok, {:named, fields}}
      {:error, [only]} -> {:ok, {:named, %{only => value}}}
      {:error, _args} -> {:ok, {:whole, value}}
    end
  end

  defp given(%Registered{takes: :places} = tool, args, kwargs) do
    cond do
      kwargs != %{} -> too_many(tool, "takes its arguments by place only: it has no names for them")
      length(args) != tool.arity -> too_many(tool, "takes #{count(tool.arity)}, #{length(args)} were given")
      true -> {:ok, {:placed, args}}
    end
  end

  defp given(tool, args, kwargs) do
    {placed, rest} = args |> Enum.zip(tool.args) |> Enum.map(fn {value, name} -> {name, value} end) |> with_rest(args)

    case {rest, for({name, _value} <- placed, is_map_key(kwargs, name), do: name)} do
      {[], []} -> {:ok, {:named, Enum.into(placed, kwargs)}}
      {[], twice} -> too_many(tool, "was given #{Enum.join(twice, ", ")} twice")
      {_more, _} -> too_many(tool, "takes #{count(length(tool.args))} by place, #{length(args)} were given")
    end
  end

  defp with_rest(placed, args), do: {placed, Enum.drop(args, length(placed))}

  # A record (a dataclass, a pydantic model, a prediction) is given as its fields, for that is what a pattern matches.
  defp fields(%{__struct__: Bridge.Record, fields: fields}) when is_map(fields), do: {:ok, fields}
  defp fields(%{__struct__: _other}), do: :error
  defp fields(%{} = map), do: if(Enum.all?(Map.keys(map), &is_binary/1), do: {:ok, map}, else: :error)
  defp fields(_value), do: :error

  defp complete(%Registered{closed: true} = tool, {:named, given}) do
    missing = for name <- tool.args, name in tool.required, not is_map_key(given, name), do: "#{name}: is missing"
    unknown = for {name, _} <- given, name not in tool.args, do: "#{name}: there is no such argument"
    if missing == [] and unknown == [], do: :ok, else: problems(tool, missing ++ unknown)
  end

  defp complete(_tool, _given), do: :ok

  defp valid(%Registered{schema: schema, checked: true} = tool, {how, given}) when how in [:named, :whole] do
    case Schema.validate(schema, without_open(given, schema)) do
      :ok -> :ok
      {:error, wrong} -> problems(tool, Enum.map(wrong, fn {path, message} -> said(path, message) end))
    end
  end

  defp valid(_tool, _given), do: :ok

  # What a schema leaves open may be anything, also what has no JSON to be judged by: an array, a reference.
  defp without_open(%{} = given, %{"properties" => %{} = properties}) when not is_struct(given) do
    open = for {name, schema} <- properties, schema in [true, %{}], is_map_key(given, name), into: %{}, do: {name, nil}
    Map.merge(given, open)
  end

  defp without_open(given, _schema), do: given

  # The schema's paths are of a value that has no name; its first member is the argument.
  defp said(path, message) do
    case Regex.run(~r/\A\["([^"]*)"\](.*)\z/s, path) do
      [_all, argument, within] -> "#{argument}#{within}: #{message}"
      nil -> "arguments#{path}: #{message}"
    end
  end

  defp ordered(%Registered{takes: :map}, {_how, given}), do: [given]
  defp ordered(%Registered{takes: :places}, {:placed, args}), do: args

  defp ordered(%Registered{takes: :names} = tool, {:named, given}) do
    for name <- tool.args, do: Map.get_lazy(given, name, fn -> tool.schema["properties"][name]["default"] end)
  end

  defp problems(tool, problems) do
    said = problems |> Enum.take(10) |> Enum.join("; ")

    Error.error(:invalid_arguments, "tool #{inspect(tool.name)}: #{said}",
      remedy: "It takes #{Registered.signature(tool)}."
    )
  end

  defp too_many(tool, said) do
    Error.error(:invalid_arguments, "tool #{inspect(tool.name)} #{said}",
      remedy: "It takes #{Registered.signature(tool)}."
    )
  end

  defp count(1), do: "1 argument"
  defp count(n), do: "#{n} arguments"

  # -- clauses -----------------------------------------------------------------------------

  # The frame on top has the arguments that nothing matched; what a function is closed over comes behind them.
  defp own?(fun, args, %{module: module, function: function}, [{module, function, top, _where} | _])
       when is_list(top) do
    info = Function.info(fun)
    List.starts_with?(top, args) and (module in [:erl_eval, :elixir_eval] or named?(info, module, function))
  end

  defp own?(_fun, _args, _error, _stacktrace), do: false

  # What is evaluated (a cell, IEx) has no name to compare; what the compiler puts where it is called has lost its own.
  defp named?(info, module, function) do
    local? = info[:type] == :local
    module == info[:module] and (function == info[:name] or (local? and Atom.to_string(function) =~ "-inlined-"))
  end

  defp no_clause(tool, args) do
    Error.new(
      :tool_error,
      "tool #{inspect(tool.name)}: no clause of #{inspect(tool.fun)} matches #{Registered.shapes(args)}",
      type: "FunctionClauseError",
      remedy: "Add a clause for it, e.g. one that takes anything and says what is wrong."
    )
  end
end
