defmodule Bridge.Store.JournalTest do
  use ExUnit.Case, async: true

  alias Bridge.{SessionStore, TestStores}

  setup do
    cfg = TestStores.start()

    :ok =
      SessionStore.begin_command(cfg, %{
        id: "c-1",
        session: "demo",
        method: "run",
        subject: "f",
        params: {1, %{}},
        key: "k",
        digest: "d"
      })

    %{cfg: cfg, on: [bridge: cfg.name]}
  end

  test "a command is kept with what it called back, in order, and with what it was answered", %{cfg: cfg} do
    :ok = SessionStore.record_call(cfg, "c-1", 2, %{method: "tool.call", seq: nil, asked: "second", effect: false})

    :ok =
      SessionStore.record_call(cfg, "c-1", 1, %{method: "tool.call", seq: 1, asked: "first", effect: false}, sync: true)

    :ok = SessionStore.record_reply(cfg, "c-1", 1, {:error, "no"})

    assert {:ok, command} = SessionStore.command(cfg, "c-1")
    assert %{session: "demo", method: "run", subject: "f", params: {1, %{}}, attempt: 1, status: :running} = command

    assert [%{n: 1, asked: "first", reply: {:ok, {:error, "no"}}}, %{n: 2, asked: "second", reply: :error}] =
             command.calls

    assert :error = SessionStore.command(cfg, "c-2")
  end

  test "a command that begins again has what it called back before", %{cfg: cfg} do
    :ok = SessionStore.record_call(cfg, "c-1", 1, %{seq: nil, method: "tool.call", asked: 1, effect: false})
    :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo", attempt: 2})
    assert {:ok, %{attempt: 2, method: "run", calls: [%{asked: 1}]}} = SessionStore.command(cfg, "c-1")
    :ok = SessionStore.forget_calls(cfg, "c-1", [1])
    assert {:ok, %{calls: []}} = SessionStore.command(cfg, "c-1")
  end

  test "it says how often it was tried, while it runs and after it has ended", %{cfg: cfg} do
    assert [%{attempt: 1}] = SessionStore.journal(cfg)
    assert :ok = SessionStore.tried(cfg, "c-1", 2)
    assert :ok = SessionStore.tried(cfg, "c-1", 3)
    assert [%{attempt: 3, status: :running}] = SessionStore.journal(cfg)
    :ok = SessionStore.end_command(cfg, "c-1", {:error, :kernel_died}, keep: true)
    assert [%{attempt: 3, error: :kernel_died}] = SessionStore.interrupted(cfg)
    # It goes on, and is tried no more until it does.
    assert {:error, %{name: :not_found}} = SessionStore.tried(cfg, "c-1", 4)
    :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo", attempt: 3})
    assert [%{attempt: 3, status: :running, error: nil}] = SessionStore.journal(cfg)
    assert :ok = SessionStore.tried(cfg, "c-1", 4)
    :ok = SessionStore.end_command(cfg, "c-1", :ok)
    assert [%{attempt: 4, status: :ended}] = SessionStore.journal(cfg)
    assert {:error, %{name: :not_found}} = SessionStore.tried(cfg, "c-1", 5)
    assert {:error, %{name: :not_found}} = SessionStore.tried(cfg, "never", 2)
  end

  test "what it writes, its end and its result are one commit", %{cfg: cfg, on: on} do
    ops = [{:set, "n", 1, nil}]

    {:ok, %{versions: %{"n" => 1}}} =
      SessionStore.commit(cfg, "c-1", "demo", ops, %{key: "k", digest: "d", value: %{"a" => 1}})

    assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)
    assert {:ok, %{digest: "d", value: %{"a" => 1}}} = SessionStore.result(cfg, "demo", "k")
    assert :error = SessionStore.result(cfg, "demo", "other")
    assert :error = SessionStore.command(cfg, "c-1")
    assert [%{id: "c-1", status: :ended, error: nil, calls: 0}] = SessionStore.journal(cfg)
  end

  test "it commits once: not again, and not after it has ended", %{cfg: cfg, on: on} do
    {:ok, _} = SessionStore.commit(cfg, "c-1", "demo", [{:set, "n", 1, nil}])
    assert {:error, %{name: :not_found}} = SessionStore.commit(cfg, "c-1", "demo", [{:set, "n", 2, nil}])
    assert :ok = SessionStore.end_command(cfg, "c-1", :ok)
    assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)
    assert [_one] = SessionStore.journal(cfg, "demo")
  end

  test "a command whose commit is refused still runs, and nothing of it is kept", %{cfg: cfg, on: on} do
    assert {:error, %{name: :conflict}} =
             SessionStore.commit(cfg, "c-1", "demo", [{:set, "a", 1, nil}, {:set, "n", 1, 7}], %{
               key: "k",
               digest: "d",
               value: 1
             })

    assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "a", on)
    assert :error = SessionStore.result(cfg, "demo", "k")
    assert {:ok, %{status: :running}} = SessionStore.command(cfg, "c-1")
  end

  test "one that fails is forgotten, with an entry in the journal that says why", %{cfg: cfg} do
    :ok = SessionStore.record_call(cfg, "c-1", 1, %{seq: nil, method: "tool.call", asked: 1, effect: false})
    :ok = SessionStore.end_command(cfg, "c-1", {:error, :remote_error})
    assert :error = SessionStore.command(cfg, "c-1")
    assert [%{error: :remote_error, calls: 1}] = SessionStore.journal(cfg, "demo")
    assert [] = SessionStore.journal(cfg, "other")
    assert :ets.tab2list(SessionStore.tables!(cfg).calls) == []
  end

  test "one that fails may be kept, and its key finds it", %{cfg: cfg} do
    :ok = SessionStore.record_call(cfg, "c-1", 1, %{seq: nil, method: "tool.call", asked: 1, effect: false})
    :ok = SessionStore.end_command(cfg, "c-1", {:error, :kernel_died}, keep: true)
    assert [%{id: "c-1", error: :kernel_died}] = SessionStore.interrupted(cfg)
    assert {:ok, %{id: "c-1", calls: [%{asked: 1}]}} = SessionStore.command_with_key(cfg, "demo", "k")
    assert :error = SessionStore.command_with_key(cfg, "other", "k")
    :ok = SessionStore.drop(cfg, "c-1")
    assert [] = SessionStore.interrupted(cfg)
    assert {:error, %{name: :not_found}} = SessionStore.drop(cfg, "c-1")
  end

  test "of a session that was deleted meanwhile nothing comes back", %{cfg: cfg, on: on} do
    :ok = SessionStore.delete_session("demo", on)
    {:ok, _} = SessionStore.create_session("demo", on)
    assert {:error, %{name: :not_found}} = SessionStore.commit(cfg, "c-1", "demo", [{:set, "n", 1, nil}])

    assert {:error, %{name: :not_found}} =
             SessionStore.record_call(cfg, "c-1", 1, %{seq: nil, method: "tool.call", asked: 1, effect: false})

    assert :ok = SessionStore.record_reply(cfg, "c-1", 1, 1)
    assert :ok = SessionStore.end_command(cfg, "c-1", :ok)
    assert {:ok, []} = SessionStore.variables("demo", on)
    assert [] = SessionStore.journal(cfg)
  end

  test "the journal remembers the last 10,000", %{cfg: cfg} do
    for n <- 1..10_010 do
      id = "x-#{n}"
      :ok = SessionStore.begin_command(cfg, %{id: id, session: "demo"})
      :ok = SessionStore.end_command(cfg, id, :ok)
    end

    ended = for %{status: :ended, id: id} <- SessionStore.journal(cfg), do: id
    assert length(ended) == 10_000
    assert {hd(ended), List.last(ended)} == {"x-11", "x-10010"}
  end

  test "what a command that carries secrets was asked, called back and gave lies sealed", %{cfg: cfg, on: on} do
    text = "only-for-the-command"
    :ok = SessionStore.begin_command(cfg, %{id: "s-1", session: "demo", params: [text], sealed: true})

    :ok =
      SessionStore.record_call(cfg, "s-1", 1, %{
        seq: nil,
        method: "session.call_tool",
        asked: %{"a" => text},
        effect: false
      })

    :ok = SessionStore.record_reply(cfg, "s-1", 1, text)
    assert {:ok, %{params: [^text], calls: [call]}} = SessionStore.command(cfg, "s-1")
    assert %{asked: %{"a" => ^text}, reply: {:ok, ^text}} = call
    refute shown(cfg) =~ text

    {:ok, _} = SessionStore.commit(cfg, "s-1", "demo", [], %{key: "sealed", digest: "d", value: [text]})
    assert {:ok, %{value: [^text]}} = SessionStore.result(cfg, "demo", "sealed")
    refute shown(cfg) =~ text
    assert {:ok, _} = SessionStore.describe("demo", on)
  end

  defp shown(cfg) do
    tables = SessionStore.tables!(cfg)
    all = for table <- [:main, :history, :commands, :calls, :ended], do: :ets.tab2list(Map.fetch!(tables, table))
    inspect(all, limit: :infinity, printable_limit: :infinity)
  end
end
