defmodule Bridge.TestScenarios do
  @moduledoc """
  The scenarios of tests/scenarios, read and run against this host; the README.md there says what their steps mean.
  """

  alias Bridge.{Schema, SessionStore, Tools}
  alias Bridge.TestScenarios.{Board, Life, Tree}

  import ExUnit.Assertions, only: [flunk: 1]

  defmodule Refused do
    @moduledoc "What a scripted tool raises."
    defexception [:message]
  end

  defmodule Life do
    @moduledoc false
    # One life of a scenario on one bridge. `started` are the tasks that are still to be joined.
    @enforce_keys [:bridge, :options, :scratch, :patience, :suffix, :board]
    defstruct @enforce_keys ++ [started: %{}]
  end

  @directory Path.expand("../../../../tests/scenarios", __DIR__)
  @kernelside Path.expand("../kernelside", @directory)
  @main "main"
  @patience_ms 30_000
  # A life that hangs ends itself after this, and its kernels with it.
  @life_ms 120_000
  @killed 128 + 9

  @type scenario :: %{String.t() => term()}

  # -- the files ------------------------------------------------------------------------------

  @doc "The files of scenarios."
  @spec files() :: [Path.t()]
  def files, do: @directory |> Path.join("*.json") |> Path.wildcard() |> Enum.reject(&(&1 == schema_file()))

  @doc "The two files that test the runner itself."
  @spec wrong(String.t()) :: Path.t()
  def wrong(name), do: Path.join([@directory, "wrong", name])

  @spec schema_file() :: Path.t()
  def schema_file, do: Path.join(@directory, "scenario.schema.json")

  @spec json!(Path.t()) :: term()
  def json!(file) do
    {:ok, content} = file |> File.read!() |> Bridge.JSON.decode()
    content
  end

  @doc "The scenarios of a file."
  @spec load!(Path.t()) :: [scenario()]
  def load!(file), do: file |> json!() |> scenarios!(file)

  @doc "The scenarios of a file's content. Raises `ArgumentError` if it does not fit the schema, or a name is there twice."
  @spec scenarios!(term(), Path.t()) :: [scenario()]
  def scenarios!(content, file) do
    schema = json!(schema_file())
    with {:error, why} <- Schema.check(schema), do: raise("#{schema_file()}: #{why}")

    with {:error, problems} <- Schema.validate(schema, content) do
      raise ArgumentError, "#{file} does not fit the schema: #{inspect(problems)}"
    end

    scenarios = content["scenarios"]
    names = Enum.map(scenarios, & &1["name"])
    if names != Enum.uniq(names), do: raise(ArgumentError, "#{file}: two scenarios have one name")
    scenarios
  end

  # -- a scenario -------------------------------------------------------------------------------

  @doc """
  Runs all lives of a scenario; those that end by the host's death have a process of their own. Bridges that scenarios
  share are started under `hosts`, a DynamicSupervisor. `patience:` is how long a wait may take.

  Raises `ExUnit.AssertionError` if something is not as the scenario expects.
  """
  @spec run(Path.t(), scenario(), Path.t(), Supervisor.supervisor(), keyword()) :: :ok
  def run(file, scenario, scratch, hosts, opts \\ []) do
    {before, [last]} = scenario |> lives() |> Enum.split(-1)
    for {_steps, number} <- Enum.with_index(before), do: in_its_own_process(file, scenario, scratch, number)

    options = Map.get(scenario, "host", %{})
    shared? = options["store"] != true and %{"restart" => "host"} not in scenario["steps"]
    bridge = if shared?, do: shared(options, hosts), else: open(own_name(), options, scratch)
    life = life(scenario, scratch, bridge, Keyword.get(opts, :patience, @patience_ms))

    try do
      live(life, scenario, before == [], last)
    after
      if not shared?, do: Bridge.stop(bridge, 0)
    end
  end

  defp live(life, scenario, first?, steps) do
    life = if first?, do: set_up(life, scenario), else: life
    life |> steps(steps) |> all_joined()
  after
    finish(life)
  end

  # Its steps, up to each death of the host.
  defp lives(scenario), do: split(scenario["steps"], [], [])
  defp split([%{"kill" => "host"} | rest], life, lives), do: split(rest, [], [Enum.reverse(life) | lives])
  defp split([step | rest], life, lives), do: split(rest, [step | life], lives)
  defp split([], life, lives), do: Enum.reverse([Enum.reverse(life) | lives])

  defp life(scenario, scratch, bridge, patience) do
    digest = :crypto.hash(:sha256, scenario["name"] <> " " <> scratch)
    {:ok, board} = Board.start_link(Path.join(scratch, "effects"))

    %Life{
      bridge: bridge,
      options: Map.get(scenario, "host", %{}),
      scratch: scratch,
      patience: patience,
      suffix: "-" <> binary_part(Base.encode16(digest, case: :lower), 0, 8),
      board: board
    }
  end

  defp in_its_own_process(file, scenario, scratch, number) do
    said = Path.join(scratch, "said-#{number}")
    script = Path.join(__DIR__, "scenario_life.exs")
    ebin = Bridge |> :code.which() |> to_string() |> Path.dirname()
    arguments = ["elixir", "-pa", ebin, script, file, scenario["name"], scratch, to_string(number)]
    # No pipe: whoever has it too may end a while after the host.
    command = ["-c", ~s(exec >"$0" 2>&1 </dev/null "$@"), said | arguments]
    env = [{"ELIXIR_ERL_OPTIONS", "+fnu"}, {"BRIDGE_PYTHON", Bridge.TestKernels.python()}]
    {"", status} = System.cmd("sh", command, env: env)
    if status != @killed, do: flunk("life #{number} ended with #{status}: #{File.read!(said)}")
  end

  @doc false
  # One life, which the process of the operating system ends with: called by scenario_life.exs.
  @spec die([String.t()]) :: no_return()
  def die([file, name, scratch, number]) do
    {:ok, _timer} = :timer.apply_after(@life_ms, System, :halt, [124])
    # It was checked by who started this.
    scenario = Enum.find(json!(file)["scenarios"], &(&1["name"] == name))
    options = Map.get(scenario, "host", %{})
    life = life(scenario, scratch, open(own_name(), options, scratch), @patience_ms)
    life = if number == "0", do: set_up(life, scenario), else: life
    steps(life, scenario |> lives() |> Enum.at(String.to_integer(number)))
    System.cmd("kill", ["-KILL", System.pid()])
    Process.sleep(:infinity)
  end

  # -- bridges ------------------------------------------------------------------------------------

  defp own_name, do: :"Bridge.TestScenarios.Own#{System.unique_integer([:positive])}"

  defp shared(options, hosts) do
    name = :"Bridge.TestScenarios.Shared#{:erlang.phash2(Tree.text(options))}"

    case DynamicSupervisor.start_child(hosts, {Bridge, opening(name, options, nil)}) do
      {:ok, _pid} -> name
      {:error, {:already_started, _pid}} -> name
    end
  end

  defp open(name, options, scratch) do
    {:ok, _pid} = Bridge.start_link(opening(name, options, scratch))
    name
  end

  defp opening(name, options, scratch) do
    own = [
      name: name,
      python: Bridge.TestKernels.python(),
      env: %{"PYTHONPATH" => @kernelside},
      kernels: Map.get(options, "kernels", 2),
      ttl: options["ttl"],
      store: if(options["store"], do: Path.join(scratch, "store"))
    ]

    quota = for name <- [:things, :bytes], value = options["quota"][to_string(name)], into: %{}, do: {name, value}
    own = if quota == %{}, do: own, else: Keyword.put(own, :quota, quota)
    if heartbeat = options["heartbeat"], do: Keyword.put(own, :heartbeat, heartbeat), else: own
  end

  # -- a life ---------------------------------------------------------------------------------------

  defp set_up(life, scenario) do
    variables = Map.get(scenario, "variables", %{})
    functions = for {name, source} <- Map.get(scenario, "functions", %{}), do: %{"function" => name, "source" => source}
    tools = for {name, script} <- Map.get(scenario, "tools", %{}), do: Map.put(script, "tool", name)
    steps(life, if(variables == %{}, do: [], else: [%{"update" => variables}]) ++ functions ++ tools)
  end

  defp steps(life, steps) do
    Enum.reduce(steps, life, fn step, life ->
      try do
        life = step(life, step)
        if Board.problems(life.board) != [], do: flunk("a tool failed")
        life
      rescue
        error in ExUnit.AssertionError ->
          problems = Enum.join(Board.problems(life.board), "; ")
          said = "#{error.message}\nat the step #{String.slice(Tree.text(step), 0, 1000)}\n#{problems}"
          reraise(%{error | message: said}, __STACKTRACE__)
      end
    end)
  end

  defp all_joined(%{started: started}) do
    if started != %{}, do: flunk("started and never joined: #{Enum.join(Map.keys(started), ", ")}")
    :ok
  end

  # Whatever became of it: what waits goes on, and nothing of it is left on the bridge.
  defp finish(life) do
    Board.open_all(life.board)

    with {:ok, sessions} <- SessionStore.sessions(bridge: life.bridge) do
      for id <- sessions, String.ends_with?(id, life.suffix), do: SessionStore.delete_session(id, bridge: life.bridge)
    end
  end

  # -- names and values -------------------------------------------------------------------------------

  defp id(life, name), do: name <> life.suffix

  # A scenario's sessions are made when they are first used, here by whoever opens them.
  defp session(life, step) do
    id = must(SessionStore.create_session(id(life, Map.get(step, "in", @main)), bridge: life.bridge))
    Bridge.session(id, bridge: life.bridge)
  end

  # Instances by the names that the scenario gave them; they outlive a host.
  defp refs(life) do
    file = Path.join(life.scratch, "refs")
    if File.exists?(file), do: json!(file), else: %{}
  end

  defp value(life, tree), do: tree |> Tree.named(refs(life)) |> Tree.read()
  defp written(value), do: Tree.written(value)

  defp arguments(life, step) do
    {value(life, Map.get(step, "args", [])),
     Map.new(Map.get(step, "kwargs", %{}), fn {k, v} -> {k, value(life, v)} end)}
  end

  defp terms(step) do
    for {name, option} <- [{"deadline", :deadline}, {"retries", :retries}, {"key", :idempotency_key}],
        is_map_key(step, name),
        do: {option, step[name]}
  end

  # -- what is expected ---------------------------------------------------------------------------------

  defp same(what, expected, found) do
    {expected, found} = {Tree.text(expected), Tree.text(found)}
    if expected != found, do: flunk("#{what} is #{found}, not #{expected}")
  end

  defp expect(life, %{"raises" => expected} = step, result) do
    case result do
      {:error, %Bridge.Error{} = error} -> same_error(expected, error)
      other -> flunk("it should raise #{Tree.text(step["raises"])}, and is #{inspect(other)}")
    end

    life
  end

  defp expect(life, step, result) do
    found = must(result)
    if is_map_key(step, "returns"), do: same("the result", step["returns"], written(found))
    life
  end

  defp must({:ok, value}), do: value
  defp must(:ok), do: nil
  defp must({:error, %Bridge.Error{} = error}), do: flunk("it raised #{error.name}: #{Exception.message(error)}")

  defp same_error(expected, error) when is_binary(expected), do: same_error(%{"error" => expected}, error)

  defp same_error(expected, error) do
    for {member, expected} <- expected do
      case member do
        "error" ->
          if Macro.underscore(expected) != to_string(error.name) or not known?(expected),
            do: flunk("it raised #{error.name}, not #{expected}: #{Exception.message(error)}")

        "type" ->
          same("the error's type", expected, error.type |> String.split(".") |> List.last())

        "says" ->
          for said <- expected, not String.contains?(error.message, said) do
            flunk("the error says nothing of #{inspect(said)}: #{error.message}")
          end

        "retryable" ->
          same("retryable", expected, error.retryable)
      end
    end
  end

  defp known?(name), do: Enum.any?(Bridge.Error.names(), &(Macro.camelize(to_string(&1)) == name))

  # -- steps: commands ----------------------------------------------------------------------------------

  @doc false
  @spec step(struct(), map()) :: struct()
  def step(life, %{"call" => name} = step), do: expect(life, step, call(life, name, step))

  def step(life, %{"start" => name, "as" => as} = step) do
    if is_map_key(life.started, as), do: flunk("#{as} was started already")
    put_in(life.started[as], Task.async(fn -> call(life, name, step) end))
  end

  def step(life, %{"join" => name} = step) do
    {started, rest} = Map.pop(life.started, name)

    result =
      case started do
        nil ->
          flunk("#{name} was not started")

        {:cancelled, result} ->
          result

        task ->
          case Task.yield(task, life.patience) do
            {:ok, result} -> result
            nil -> flunk("#{name} has not ended")
          end
      end

    expect(%{life | started: rest}, step, result)
  end

  # Whoever waits for a command and dies has it cancelled; there is nobody left to be told, so the runner says it.
  def step(life, %{"cancel" => name}) do
    result =
      case Task.shutdown(Map.fetch!(life.started, name)) do
        {:ok, result} -> result
        nil -> Bridge.Error.error(:cancelled)
      end

    put_in(life.started[name], {:cancelled, result})
  end

  def step(life, %{"stream" => name} = step) do
    me = self()
    on_return = if is_map_key(step, "returns"), do: [on_return: &send(me, {:returned, &1})], else: []
    stream = Bridge.stream(session(life, step), name, arguments(life, step), on_return ++ terms(step))
    # One value at a time, so that what came before an error is known.
    pull = &Enumerable.reduce(stream, &1, fn value, nil -> {:suspend, {:value, value}} end)
    {life, got, result} = read(life, step, pull, [])
    life = expect(life, step, result)

    with %{"take" => take} when take != length(got) <- step, do: flunk("the stream ended after #{length(got)} values")
    if is_map_key(step, "yields"), do: same("what it yielded", step["yields"], got)
    life
  end

  def step(life, %{"create" => class, "as" => as} = step) do
    %{id: id} = session = session(life, step)

    result =
      with {:ok, ref} <- Bridge.create_instance(class, arguments(life, step), session: session) do
        ^id = ref.session
        File.write!(Path.join(life.scratch, "refs"), Bridge.JSON.encode!(Map.put(refs(life), as, ref.id)))
        :ok
      end

    expect(life, step, result)
  end

  # -- steps: a session -----------------------------------------------------------------------------------

  def step(life, %{"set" => name, "to" => tree} = step) do
    opts = if version = step["if_version"], do: [if_version: version], else: []
    expect(life, step, SessionStore.set_variable(session(life, step), name, value(life, tree), opts))
  end

  def step(life, %{"get" => name} = step) do
    expect(life, step, SessionStore.get_variable(session(life, step), name))

    if is_map_key(step, "version") do
      same("the version", step["version"], must(SessionStore.variable(session(life, step), name)).version)
    end

    life
  end

  def step(life, %{"delete" => name} = step) do
    expect(life, step, SessionStore.delete_variable(session(life, step), name))
  end

  def step(life, %{"update" => changes} = step) do
    changes = Map.new(changes, fn {name, tree} -> {name, value(life, tree)} end)
    expect(life, step, SessionStore.update_variables(session(life, step), changes))
  end

  def step(life, %{"variables" => names} = step) do
    found = for variable <- must(SessionStore.variables(session(life, step))), do: variable.name
    same("the variables", Enum.sort(names), Enum.sort(found))
    life
  end

  def step(life, %{"history" => name, "values" => values} = step) do
    history = must(SessionStore.history(session(life, step), name))
    same("the history", values, Enum.map(history, &written(&1.value)))
    life
  end

  def step(life, %{"define" => name, "schema" => schema} = step) do
    expect(life, step, SessionStore.set_type(session(life, step), name, schema))
  end

  def step(life, %{"function" => name, "source" => source} = step) do
    source = Enum.map_join(source, &(String.replace(&1, "$SCRATCH", life.scratch) <> "\n"))
    expect(life, step, Bridge.define(session(life, step), name, source))
  end

  # Before `sessions`, which is one of its members.
  def step(life, %{"export" => file} = step) do
    sessions = step |> Map.get("sessions", [@main]) |> Enum.map(&id(life, &1))
    must(Bridge.export(Path.join(life.scratch, file), sessions: sessions, history: true, bridge: life.bridge))
    life
  end

  def step(life, %{"import" => file}) do
    must(Bridge.import(Path.join(life.scratch, file), bridge: life.bridge))
    life
  end

  def step(life, %{"sessions" => names}) do
    sessions = must(SessionStore.sessions(bridge: life.bridge))
    found = for id <- sessions, String.ends_with?(id, life.suffix), do: String.replace_suffix(id, life.suffix, "")
    same("the sessions", Enum.sort(names), Enum.sort(found))
    life
  end

  def step(life, %{"delete_session" => name} = step) do
    expect(life, step, SessionStore.delete_session(id(life, name), bridge: life.bridge))
  end

  # -- steps: tools and gates -------------------------------------------------------------------------------

  def step(life, %{"tool" => name} = step) do
    taken = for parameter <- Map.get(step, "takes", []), {name, type} <- parameter, do: {name, type}
    names = Enum.map(taken, &elem(&1, 0))

    schema = %{
      "type" => "object",
      "properties" =>
        Map.new(taken, fn {name, type} -> {name, if(type == "any", do: %{}, else: %{"type" => type})} end),
      "required" => names,
      "additionalProperties" => false
    }

    # The life as it is now: what is started later is no tool's to know.
    fun = tool(length(names), &act(life, name, Map.new(Enum.zip(names, &1)), Map.get(step, "does", [])))
    opts = [schema: schema, args: names, idempotent: Map.get(step, "idempotent", false)]
    must(Tools.register(session(life, step), name, fun, opts))
    life
  end

  def step(life, %{"open" => gate}) do
    Board.open(life.board, gate)
    life
  end

  def step(life, %{"await" => gate} = step) do
    times = Map.get(step, "times", 1)
    if not Board.wait(life.board, gate, times, life.patience), do: flunk("#{gate} was not opened #{times} times")
    life
  end

  def step(life, %{"ran" => tool} = step) do
    runs = Enum.filter(Board.effects(life.board), &(&1["tool"] == tool))
    given = Enum.map(runs, & &1["given"])
    order = if step["in_any_order"], do: fn trees -> Enum.sort_by(trees, &Tree.text/1) end, else: & &1

    if is_map_key(step, "with"), do: same("what #{tool} ran with", order.(step["with"]), order.(given))
    if is_map_key(step, "times"), do: same("how often #{tool} ran", step["times"], length(runs))

    with %{"at_most" => most} when length(runs) > most <- step, do: flunk("#{tool} ran #{length(runs)} times")

    if step["under_one_id"] do
      ids = Enum.map(runs, & &1["id"])
      if length(Enum.uniq(ids)) != 1, do: flunk("#{tool} ran as #{inspect(ids)}")
    end

    life
  end

  def step(life, %{"eventually" => step}), do: eventually(life, step, now() + life.patience)

  # -- steps: ends --------------------------------------------------------------------------------------------

  def step(life, %{"kill" => "kernels"}) do
    busy = for %{in_flight: in_flight, os_pid: pid} when in_flight > 0 <- Bridge.kernels!(bridge: life.bridge), do: pid
    if busy == [], do: flunk("no kernel runs a command")
    Enum.each(busy, &Bridge.TestProcesses.signal(&1, "KILL"))
    life
  end

  def step(life, %{"restart" => "host"}) do
    # At once, as the Python host closes: what still runs is interrupted.
    :ok = Bridge.stop(life.bridge, 0)
    for {_name, %Task{} = task} <- life.started, do: Task.shutdown(task)
    open(life.bridge, life.options, life.scratch)
    %{life | started: %{}}
  end

  def step(life, %{"quarantine" => names}) do
    found = for %{name: name} <- Bridge.quarantine!(bridge: life.bridge), do: name
    same("the quarantine", Enum.sort(names), Enum.sort(found))
    life
  end

  def step(life, %{"release" => name} = step), do: expect(life, step, Bridge.release(name, bridge: life.bridge))

  def step(life, %{"interrupted" => expected}) do
    expected = for one <- expected, do: {one["subject"], Enum.sort(Map.get(one, "in_doubt", []))}
    found = for one <- interrupted(life), do: {one.subject, Enum.sort(Enum.map(one.in_doubt, & &1.tool))}
    if expected != found, do: flunk("what was interrupted is #{inspect(found)}, not #{inspect(expected)}")
    life
  end

  def step(life, %{"resume" => subject} = step) do
    {id, calls} = find(life, subject)

    replies =
      Map.new(Map.get(step, "replies", %{}), fn {tool, tree} -> {Map.get(calls, tool, tool), value(life, tree)} end)

    rerun = for tool <- Map.get(step, "rerun", []), do: Map.get(calls, tool, tool)
    expect(life, step, Bridge.resume(id, replies: replies, rerun: rerun, bridge: life.bridge))
  end

  def step(life, %{"drop" => subject} = step) do
    {id, _calls} = find(life, subject)
    expect(life, step, Bridge.drop(id, bridge: life.bridge))
  end

  # -- of commands ----------------------------------------------------------------------------------------------

  defp call(life, name, step) do
    session = session(life, step)

    if instance = step["on"] do
      # As a value that was kept: whether it is still there is the host's to say.
      ref = %Bridge.Ref{id: Map.fetch!(refs(life), instance), session: session.id, bridge: life.bridge}
      Bridge.call_method(ref, name, arguments(life, step), terms(step))
    else
      Bridge.call(session, name, arguments(life, step), terms(step))
    end
  end

  # `{life, values, result}`; the result is what the generator returned.
  defp read(life, %{"take" => take}, pull, got) when length(got) == take do
    {:halted, nil} = pull.({:halt, nil})
    {life, Enum.reverse(got), :ok}
  end

  defp read(life, step, pull, got) do
    case next(pull) do
      {:value, value, pull} ->
        life = if got == [] and step["meanwhile"], do: step(life, step["meanwhile"]), else: life
        read(life, step, pull, [written(value) | got])

      :done ->
        {life, Enum.reverse(got), returned(step)}

      {:error, error} ->
        {life, Enum.reverse(got), {:error, error}}
    end
  end

  defp returned(step) when not is_map_key(step, "returns"), do: :ok

  defp returned(_step) do
    receive do
      {:returned, value} -> {:ok, value}
    after
      0 -> flunk("the stream did not say what its generator returned")
    end
  end

  defp next(pull) do
    case pull.({:cont, nil}) do
      {:suspended, {:value, value}, pull} -> {:value, value, pull}
      {ended, nil} when ended in [:done, :halted] -> :done
    end
  rescue
    error in Bridge.Error -> {:error, error}
  end

  defp eventually(life, step, until) do
    step(life, step)
  rescue
    error in ExUnit.AssertionError ->
      if now() > until, do: reraise(error, __STACKTRACE__)
      Process.sleep(10)
      eventually(life, step, until)
  end

  defp interrupted(life) do
    for one <- must(Bridge.interrupted(bridge: life.bridge)), String.ends_with?(one.session, life.suffix), do: one
  end

  # An interrupted command's id, and those of its calls in doubt by their tool.
  defp find(life, subject) do
    case Enum.find(interrupted(life), &(&1.subject == subject)) do
      nil -> {subject, %{}}
      one -> {one.id, Map.new(one.in_doubt, &{&1.tool, &1.id})}
    end
  end

  defp now, do: System.monotonic_time(:millisecond)

  # -- of tools --------------------------------------------------------------------------------------------------

  defp tool(0, run), do: fn -> run.([]) end
  defp tool(1, run), do: fn a -> run.([a]) end
  defp tool(2, run), do: fn a, b -> run.([a, b]) end
  defp tool(3, run), do: fn a, b, c -> run.([a, b, c]) end
  defp tool(4, run), do: fn a, b, c, d -> run.([a, b, c, d]) end

  defp act(life, tool, given, actions) do
    %{id: id, tool: ^tool} = Bridge.current_call()
    given = Map.new(given, fn {name, value} -> {name, written(value)} end)
    # Before anything else: this is the effect that is counted.
    number = Board.ran(life.board, %{"tool" => tool, "given" => given, "id" => id})
    own = %{"$argument" => given, "$run" => %{"number" => number, "id" => id}}
    Enum.reduce(actions, nil, fn action, result -> action(life, tool, Tree.filled(action, own), result) end)
  end

  @doc false
  @spec action(struct(), String.t(), map(), term()) :: term()
  def action(life, _tool, %{"opens" => gate}, result) do
    Board.open(life.board, gate)
    result
  end

  def action(life, tool, %{"waits_for" => gate}, result) do
    if not Board.wait(life.board, gate, 1, life.patience),
      do: Board.problem(life.board, "tool #{tool} waited for #{inspect(gate)} in vain")

    result
  end

  def action(life, tool, %{"kills" => "kernels"}, result) do
    step(life, %{"kill" => "kernels"})
    result
  rescue
    # It would be the tool's error, for the command to catch.
    error in ExUnit.AssertionError -> Board.problem(life.board, "tool #{tool}: #{error.message}")
  end

  def action(life, _tool, %{"sets" => name, "to" => tree} = action, result) do
    with {:error, error} <- SessionStore.set_variable(session(life, action), name, value(life, tree)), do: raise(error)
    result
  end

  def action(life, _tool, %{"calls" => name} = action, _result) do
    case call(life, name, action) do
      {:ok, value} -> value
      {:error, error} -> raise error
    end
  end

  def action(life, _tool, %{"returns" => tree}, _result), do: value(life, tree)
  def action(_life, _tool, %{"raises" => text}, _result), do: raise(Refused, text)
end

defmodule Bridge.TestScenarios.Tree do
  @moduledoc false
  # Values as scenarios write them: as on the wire, but with their buffers in place.

  @doc "The term of a value."
  @spec read(term()) :: term()
  def read(tree) do
    {tree, buffers} = taken(tree, [])

    case Bridge.Value.decode(tree, Enum.reverse(buffers)) do
      {:ok, value} -> value
      {:error, error} -> raise error
    end
  end

  defp taken(%{"$bridge" => kind, "base64" => data} = tree, buffers) when kind in ["ndarray", "table"] do
    {tree |> Map.delete("base64") |> Map.put("buffer", length(buffers)), [Base.decode64!(data) | buffers]}
  end

  defp taken(%{} = tree, buffers) do
    {members, buffers} =
      Enum.map_reduce(tree, buffers, fn {name, item}, buffers ->
        {item, buffers} = taken(item, buffers)
        {{name, item}, buffers}
      end)

    {Map.new(members), buffers}
  end

  defp taken(tree, buffers) when is_list(tree), do: Enum.map_reduce(tree, buffers, &taken/2)
  defp taken(tree, buffers), do: {tree, buffers}

  @doc "What a term is in a scenario."
  @spec written(term()) :: term()
  def written(value) do
    case Bridge.Value.encode(value) do
      {:ok, json, buffers} -> placed(json, List.to_tuple(buffers))
      {:error, error} -> raise error
    end
  end

  defp placed(%{"$bridge" => _kind, "buffer" => number} = tree, buffers) when is_integer(number) do
    tree |> Map.delete("buffer") |> Map.put("base64", Base.encode64(elem(buffers, number)))
  end

  defp placed(%{} = tree, buffers), do: Map.new(tree, fn {name, item} -> {name, placed(item, buffers)} end)
  defp placed(tree, buffers) when is_list(tree), do: Enum.map(tree, &placed(&1, buffers))
  defp placed(tree, _buffers), do: tree

  @doc "With the instances that the scenario named under their own ids."
  @spec named(term(), map()) :: term()
  def named(%{"$bridge" => "ref", "id" => id} = tree, refs) when is_map_key(refs, id), do: %{tree | "id" => refs[id]}
  def named(%{} = tree, refs), do: Map.new(tree, fn {name, item} -> {name, named(item, refs)} end)
  def named(tree, refs) when is_list(tree), do: Enum.map(tree, &named(&1, refs))
  def named(tree, _refs), do: tree

  @doc "With what only the tool's call knows put in."
  @spec filled(term(), map()) :: term()
  def filled(%{} = tree, own) when map_size(tree) == 1 do
    [{name, what}] = Map.to_list(tree)
    if is_map_key(own, name), do: Map.fetch!(own[name], what), else: %{name => filled(what, own)}
  end

  def filled(%{} = tree, own), do: Map.new(tree, fn {name, item} -> {name, filled(item, own)} end)
  def filled(tree, own) when is_list(tree), do: Enum.map(tree, &filled(&1, own))
  def filled(tree, _own), do: tree

  @doc "The same text for two values that are equal: those of 1 and 1.0 differ."
  @spec text(term()) :: String.t()
  def text(tree), do: tree |> unordered() |> Bridge.JSON.canonical()

  # The one thing in which this host may differ from the Python host: the pairs of a dict have no order here, for a map has
  # none. So they are compared as a set of pairs.
  defp unordered(%{"$bridge" => "map", "items" => pairs} = tree) when is_list(pairs) do
    %{tree | "items" => pairs |> Enum.map(&unordered/1) |> Enum.sort_by(&Bridge.JSON.canonical/1)}
  end

  defp unordered(%{} = tree), do: Map.new(tree, fn {name, item} -> {name, unordered(item)} end)
  defp unordered(tree) when is_list(tree), do: Enum.map(tree, &unordered/1)
  defp unordered(tree), do: tree
end

defmodule Bridge.TestScenarios.Board do
  @moduledoc false
  # What the tools of a life and its steps have in common: gates, effects on disk, and what went wrong where no step saw it.

  use GenServer

  @spec start_link(Path.t()) :: GenServer.on_start()
  def start_link(effects), do: GenServer.start_link(__MODULE__, effects)

  @spec open(pid(), String.t()) :: :ok
  def open(board, gate), do: GenServer.call(board, {:open, gate}, :infinity)

  @doc "Opens all that somebody waits for."
  @spec open_all(pid()) :: :ok
  def open_all(board), do: GenServer.call(board, :open_all, :infinity)

  @doc "Whether the gate was opened so often before the time was over."
  @spec wait(pid(), String.t(), pos_integer(), pos_integer()) :: boolean()
  def wait(board, gate, times, timeout), do: GenServer.call(board, {:wait, gate, times, timeout}, :infinity)

  @doc "Writes down that a tool runs; how often it has, over all lives of the host."
  @spec ran(pid(), map()) :: pos_integer()
  def ran(board, effect), do: GenServer.call(board, {:ran, effect}, :infinity)

  @spec effects(pid()) :: [map()]
  def effects(board), do: GenServer.call(board, :effects, :infinity)

  @spec problem(pid(), String.t()) :: :ok
  def problem(board, text), do: GenServer.call(board, {:problem, text}, :infinity)

  @spec problems(pid()) :: [String.t()]
  def problems(board), do: GenServer.call(board, :problems, :infinity)

  @impl true
  def init(effects), do: {:ok, %{effects: effects, opened: %{}, waiting: %{}, problems: []}}

  @impl true
  def handle_call({:open, gate}, _from, state) do
    {:reply, :ok, passed(%{state | opened: Map.update(state.opened, gate, 1, &(&1 + 1))})}
  end

  def handle_call(:open_all, _from, state) do
    for {_ref, {from, _gate, _times}} <- state.waiting, do: GenServer.reply(from, true)
    {:reply, :ok, %{state | waiting: %{}}}
  end

  def handle_call({:wait, gate, times, timeout}, from, state) do
    ref = make_ref()
    Process.send_after(self(), {:in_vain, ref}, timeout)
    {:noreply, passed(put_in(state.waiting[ref], {from, gate, times}))}
  end

  def handle_call({:ran, effect}, _from, state) do
    File.write!(state.effects, [Bridge.JSON.encode!(effect), "\n"], [:append])
    {:reply, Enum.count(read(state), &(&1["tool"] == effect["tool"])), state}
  end

  def handle_call(:effects, _from, state), do: {:reply, read(state), state}
  def handle_call({:problem, text}, _from, state), do: {:reply, :ok, %{state | problems: [text | state.problems]}}
  def handle_call(:problems, _from, state), do: {:reply, state.problems, state}

  @impl true
  def handle_info({:in_vain, ref}, state) do
    {waits, waiting} = Map.pop(state.waiting, ref)
    with {from, _gate, _times} <- waits, do: GenServer.reply(from, false)
    {:noreply, %{state | waiting: waiting}}
  end

  defp passed(state) do
    {through, waiting} =
      Enum.split_with(state.waiting, fn {_ref, {_from, gate, times}} -> Map.get(state.opened, gate, 0) >= times end)

    for {_ref, {from, _gate, _times}} <- through, do: GenServer.reply(from, true)
    %{state | waiting: Map.new(waiting)}
  end

  defp read(state) do
    if File.exists?(state.effects) do
      for line <- state.effects |> File.read!() |> String.split("\n", trim: true) do
        {:ok, effect} = Bridge.JSON.decode(line)
        effect
      end
    else
      []
    end
  end
end
